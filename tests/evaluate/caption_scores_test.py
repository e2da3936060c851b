"""Words and scores against the official COCO evaluation, whose results are recorded beside this file.

caption_scores.json: texts with the words of Stanford's PTBTokenizer; captions and references with what pycocoevalcap
1.2 computes from their words. words.json: more texts with their official words, 437 chosen to be hard, and 200 put
together at random from words and signs of many scripts. DIFFERENT lists the texts of words.json whose words are not the
official ones: each would need a rule of its own.
"""

from __future__ import annotations

import json
import pathlib
import time
import unicodedata

import numpy as np
import pytest

from coca_jax.evaluate import caption_scores
from coca_jax.evaluate.words import words

RECORDED = json.loads((pathlib.Path(__file__).parent / "caption_scores.json").read_text())
CAPTIONS = [text.split() for text in RECORDED["captions"]]
REFERENCES = [[text.split() for text in texts] for texts in RECORDED["references"]]
# Text: (official words, words of coca_jax).
DIFFERENT: dict[str, dict[str, tuple[str, str]]] = {
    "hard": {
        ("a&mdash;b &ndash; &MD; &#39; &quot;x&quot; &apos;x&apos; &lt;b&gt; &nbsp;x &eacute;t&eacute; caf&eacute;"): (
            "a b &#39; x x < b > x &eacute;t&eacute; caf&eacute;",
            "a b &#39; x x < b > x & eacute t & eacute caf & eacute",
        ),
        (
            "o'clock y'all y'know d'Avignon l'eau c'mon rock'n'roll rock 'n' roll 'n dunkin' somethin' ol' 'em "
            "'90s '99 '80s shi'ite B'Gosh O'Brien qu'il aujourd'hui s'more jack-o'-lantern ev'ry nor'easter "
            "cont'd 'cause 'till 'til e'er"
        ): (
            (
                "o'clock y' all y' know d'avignon l'eau c'mon rock 'n' roll rock 'n' roll 'n dunkin' somethin' "
                "ol' 'em '90s '99 '80s shi'ite b'gosh o'brien qu'il aujourd hui s more jack-o lantern ev'ry "
                "nor'easter cont 'd 'cause 'till 'til e'er"
            ),
            (
                "o'clock y' all y' know d'avignon l'eau c'mon rock 'n' roll rock 'n' roll 'n dunkin' somethin' "
                "ol' 'em '90s '99 '80s shi'ite b gosh o'brien qu il aujourd hui s more jack-o lantern ev'ry "
                "nor'easter cont 'd 'cause 'till 'til e'er"
            ),
        ),
        (
            "5'10\" 6' 6\" 3.5 .5 1,000.50 10:30 1:2:3 -5 +5 -5.5 1/2 1 1/2 3-1/2 1/2/2004 2004-10-12 12/25 "
            "5x5 4x4s 1990s 2nd 50% $5 US$5 A$5 \u20ac5 \xa35 5\u20ac 5\xa2 \xa55 #5 x\xb2 CO\u2082 "
            "10\u207b\xb3 10\xb2\xb3 \xbd 1\xbd \u2154"
        ): (
            (
                "5 10 6 6 3.5 .5 1,000.50 10:30 1:2:3 -5 +5 -5.5 1/2 1\xa01/2 3-1/2 1/2/2004 2004-10-12 12/25 "
                "5x5 4x4s 1990s 2nd 50 % $ 5 us$ 5 a$ 5 $ 5 # 5 5 $ 5 cents \xa5 5 # 5 x \xb2 co \u2082 10 "
                "\u207b\xb3 10 \xb2\xb3 1/2 1 1/2 2/3"
            ),
            (
                "5 10 6 6 3.5 .5 1,000.50 10:30 1:2:3 -5 +5 -5.5 1/2 1\xa01/2 3-1/2 1/2/2004 2004-10-12 12/25 "
                "5x5 4x4s 1990s 2nd 50 % $ 5 us$ 5 a$ 5 $ 5 # 5 5 $ 5 cents \xa5 5 # 5 x \xb2 co \u2082 10 "
                "\u207b \xb3 10 \xb2 \xb3 1/2 1 1/2 2/3"
            ),
        ),
        "(555) 123-4567 555-123-4567 555.123.4567 +1 555 123 4567 123 4567 12 3456 2012 2013 1234 5678": (
            (
                "-lrb-555-rrb-\xa0123-4567 555-123-4567\xa0555 .123.4567 +1 555\xa0123\xa04567\xa0123 "
                "4567\xa012\xa03456\xa02012 2013\xa01234\xa05678"
            ),
            (
                "-lrb-555-rrb-\xa0123-4567 555-123-4567 555.123.4567 +1\xa0555\xa0123\xa04567 123 4567 12 3456 "
                "2012 2013 1234 5678"
            ),
        ),
        ("A.T.&T. AT&T A&E R&B r&b a&b S&P-500 S&Ls C+C c++ C# F# .NET Node.js a+b A+ B- Q&A q&amp;a AT&amp;T"): (
            ("a.t. & t. at&t a&e r&b r & b a & b s&p-500 s&ls c+c c++ c# f# net node.js a + b a + b q&a q & a at&t"),
            ("a.t. & t. at&t a&e r&b r & b a & b s&p -500 s&l s c+c c++ c# f# net node.js a + b a + b q&a q & a at&t"),
        ),
        (
            "* ** *** \\* \\ / // | ~ ^ % & + = < > << >> [ ] { } ( ) ` `` ' '' \" \"\" ''' \xb4 \xa8 \xa6 "
            "\xa7 \xa9 \xae \u2122 \xb0 \xb5 \xb7 \xb6 \u2022 \u2020 \u2021"
        ): (
            (
                "* ** *** \\* \\ / / / | ~ ^ % & + = < > << >> -lsb- -rsb- -lcb- -rcb- -lrb- -rrb- \xb4 \xa8 "
                "\xa6 \xa7 \xa9 \xae \u2122 \xb0 \xb5 \xb7 \xb6 \u2022 \u2020 \u2021"
            ),
            (
                "* ** *** \\ * \\ / / / | ~ ^ % & + = < > << >> -lsb- -rsb- -lcb- -rcb- -lrb- -rrb- \xb4 \xa8 "
                "\xa6 \xa7 \xa9 \xae \u2122 \xb0 \xb5 \xb7 \xb6 \u2022 \u2020 \u2021"
            ),
        ),
        "10\u207b\xb3": (
            "10 \u207b\xb3",
            "10 \u207b \xb3",
        ),
        "l'eau qu'il aujourd'hui": (
            "l'eau qu'il aujourd hui",
            "l'eau qu il aujourd hui",
        ),
        "(^_^) (^.^) ('_') =_= >_< -_- x_x ^_^": (
            "-lrb-^_^-rrb- -lrb-^.^-rrb- -lrb-'_'-rrb- =_= >_< -_- x_x ^_^",
            "-lrb-^_^-rrb- -lrb-^.^-rrb- -lrb- _ -rrb- =_= >_< -_- x_x ^_^",
        ),
        "&lt;a@b.com&gt;": (
            "&lt;a@b.com&gt;",
            "< a@b.com>",
        ),
        "S&amp;P-500": (
            "s&p-500",
            "s&p -500",
        ),
        "\u2019\xaba\xbb\u2019": (
            "'`` a '''",
            "a",
        ),
        "@a.b@c": (
            "@a b@c",
            "@a .b@c",
        ),
        "\u201ca\u201d\u2019s": (
            "a ''' s",
            "a 's",
        ),
        "\u0663\u066b\u0665": (
            "\u0663\u066b\u0665",
            "\u0663 \u0665",
        ),
        "5a.jpg 5a.jpg, 5a.jpg; 5a.jpg) 5a.htm 5a.html. 5a.c 5a.cp": (
            "5a.jpg 5a.jpg 5a jpg 5a jpg -rrb- 5a.htm 5a.html 5a.c 5a cp",
            "5a.jpg 5a jpg 5a jpg 5a jpg -rrb- 5a.htm 5a.html 5a c 5a cp",
        ),
        "1.x": (
            "1.x",
            "1 x",
        ),
        "v2.0.zip": (
            "v2.0.zip",
            "v2 .0 zip",
        ),
    },
    "mixed": {
        (
            "$5a.b.c \u0965can't\uff1f10:30 \u0995\u09c1\u0995\u09c1\u09b0\xa2 \xbf "
            "\u0570\u0561\u0575\u0565\u0580\u0565\u0576"
        ): (
            (
                "$ 5a.b.c \u0965 ca n't \uff1f 10:30 \u0995\u09c1\u0995\u09c1\u09b0 cents \xbf "
                "\u0570\u0561\u0575\u0565\u0580\u0565\u0576"
            ),
            (
                "$ 5a b.c \u0965 ca n't \uff1f 10:30 \u0995\u09c1\u0995\u09c1\u09b0 cents \xbf "
                "\u0570\u0561\u0575\u0565\u0580\u0565\u0576"
            ),
        ),
        "\xa1www.foo.com --- ;e-mail +foo.com2nd i.e. \xbb": (
            "\xa1www.foo.com e-mail +foo.com 2nd i.e.",
            "\xa1 www.foo.com e-mail + foo.com2nd i.e.",
        ),
        "J.K. \xa510:30 \xe9tat Y@user\u201d no.": (
            "j.k. \xa5 10:30 \xe9tat y@user\u201d no",
            "j.k. \xa5 10:30 \xe9tat y@user no",
        ),
        "and/or \uff1f R&B \xbd50% can't http://x.org/y\u20b9Mr.\xad": (
            "and/or \uff1f r&b 1/2 50 % ca n't http://x.org/y\u20b9mr.\xad",
            "and/or \uff1f r&b 1/2 50 % ca n't http://x.org/y mr.",
        ),
        "Inc. \xbfwww.foo.comred ?!1,000 na\xefve?": (
            "inc. \xbfwww.foo.com red ?! 1,000 na\xefve",
            "inc. \xbf www.foo.comred ?! 1,000 na\xefve",
        ),
        "] :)\u20ac [ ^ \u2019\uff1f \U0001f389 \u20ac\u201d`` \xbd''": (
            "-rsb- :-rrb- $ -lsb- ^ \uff1f $ ''` 1/2",
            "-rsb- :-rrb- $ -lsb- ^ \uff1f $ 1/2",
        ),
        "\xbb--- , \u2026 Y \u066a \U0001f600www.foo.com @": (
            "y \u066a \U0001f600www.foo.com @",
            "y \u066a www.foo.com @",
        ),
    },
}


def test_words_are_those_of_the_penn_treebank() -> None:
    assert len(RECORDED["words"]) == 102
    assert {text: words(text) for text in RECORDED["words"]} == RECORDED["words"]


@pytest.mark.parametrize("kind", ["hard", "mixed"])
def test_words_of_all_scripts_and_signs_are_the_official_ones_except_for_those_listed(kind: str) -> None:
    """Combining marks, entities, addresses, numbers, faces, emoji, quotes and abbreviations: at least 95% are equal."""
    recorded = json.loads((pathlib.Path(__file__).parent / "words.json").read_text())[kind]
    assert len(recorded) >= 200 and len(DIFFERENT[kind]) <= 0.05 * len(recorded)
    found = {text: " ".join(words(text)) for text in recorded}
    different = {text: (recorded[text], found[text]) for text in recorded if found[text] != recorded[text]}
    assert different == DIFFERENT[kind]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\u0915\u0941\u0924\u094d\u0924\u093e", ["\u0915\u0941\u0924\u094d\u0924\u093e"]),  # a dog, in Hindi
        ("5'10\" c++ Ph.D. \U0001f600 &amp; AT&amp;T", ["5", "10", "c++", "ph.d.", "&", "at&t"]),
        ("cafe\u0301", ["cafe\u0301"]),  # the official tokenizer composes nothing
        ("a\rb\u2028c", ["a", "b", "c"]),  # where the official evaluation would mix up its captions
        ("", []),
        ("\U0001f600 \u200d .", []),
    ],
)
def test_words_of_single_texts(text: str, expected: list[str]) -> None:
    assert words(text) == expected


def test_words_of_a_very_long_text_take_time_in_proportion() -> None:
    """Captions come from anywhere: rules that look for an @ or a .com must not look through all of it at each place."""
    started = time.monotonic()
    for unit in ("<a", "\U0001f600.", "a@", "x.com/"):
        words(unit * 1000)
    assert time.monotonic() - started < 30


def test_composed_and_decomposed_letters_are_the_same_to_the_scores() -> None:
    texts = ["un caf\u00e9 noir", "deux th\u00e9s"]
    found, _ = caption_scores.scores([unicodedata.normalize("NFD", text) for text in texts], [[text] for text in texts])
    assert found == caption_scores.scores(texts, [[text] for text in texts])[0] and found["cider"] > 1


def test_scores_are_those_of_the_reference() -> None:
    """The same sums of float64 in another order."""
    np.testing.assert_allclose(caption_scores.bleu(CAPTIONS, REFERENCES), RECORDED["bleu"], rtol=1e-12)
    np.testing.assert_allclose(caption_scores.rouge_l(CAPTIONS, REFERENCES), RECORDED["rouge_each"], rtol=1e-12)
    each = caption_scores.cider(CAPTIONS, REFERENCES)
    np.testing.assert_allclose(each, RECORDED["cider_each"], rtol=1e-12, atol=1e-12)
    assert min(each) == 0 < max(each) and np.mean(each) == pytest.approx(RECORDED["cider"], rel=1e-12)


def test_texts_go_through_the_words() -> None:
    texts = ["A red dot.", "The dog's ball, red!"]
    found, each = caption_scores.scores(texts, [["a red dot"], ["the dog 's ball red", "a ball"]])
    assert found["bleu_1"] == pytest.approx(1) and found["rouge_l"] == pytest.approx(1)
    assert each.shape == (2,) and found["cider"] == pytest.approx(each.mean())


def test_what_cannot_be_scored_is_said() -> None:
    with pytest.raises(ValueError, match="0 captions"):
        caption_scores.scores([], [])
    with pytest.raises(ValueError, match="2 captions with references for 1"):
        caption_scores.scores(["a", "b"], [["a"]])
    with pytest.raises(ValueError, match="caption 1 has no reference"):
        caption_scores.scores(["a", "b"], [["a"], []])
