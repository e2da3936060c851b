"""Sentences beside figures that say less than they seem to: rankings that cannot fail, scores of nothing."""

from __future__ import annotations

from collections.abc import Mapping

from coca_jax.evaluate import retrieval


def of_metrics(metrics: Mapping[str, float]) -> list[str]:
    """What must be known of these metrics of `suite.run`; each sentence begins with the name of a metric."""
    found: list[str] = []
    for key in sorted(metrics):
        name, _, what = key.rpartition("/")
        if what == "same_texts":
            found += _of_retrieval(metrics, name)
        elif what == "classes_without_images":
            found += _of_classes(metrics, name)
        elif what == "cider_defined":
            found += _of_caption_scores(metrics, name)
    return found


def _of_retrieval(metrics: Mapping[str, float], name: str) -> list[str]:
    found = []
    if same := metrics[f"{name}/same_texts"]:
        found.append(f"{name}/same_texts: the model reads {same:g} captions as others; they count as the same text")
    for direction, candidates in (("image_to_text", "texts"), ("text_to_image", "images")):
        count = metrics[f"{name}/{candidates}"]
        if trivial := [f"R@{k}" for k in retrieval.KS if count <= k]:
            found.append(
                f"{name}/{direction}: any ranking of {_count(count, candidates)} has {', '.join(trivial)} of 1"
            )
    if f"{name}/image_to_text_pmi/r1" in metrics:
        found += _of_pmi(f"{name}/image_to_text_pmi", metrics[f"{name}/images"])
    return found


def _of_classes(metrics: Mapping[str, float], name: str) -> list[str]:
    found, count = [], metrics[f"{name}/classes"]
    if without := metrics[f"{name}/classes_without_images"]:
        text = f"{name}: {without:g} of {_count(count, 'classes')} have no image; they are answers that can be given"
        found.append(f"{text}, and not in the mean of classes")
    if same := metrics.get(f"{name}/same_classes"):
        found.append(f"{name}/same_classes: the model reads {same:g} classes as others; they count as the same class")
    if count <= 5:
        top = "top-1 and top-5" if count == 1 else "top-5"
        found.append(f"{name}: any ranking of {_count(count, 'classes')} has a {top} of 1")
    if f"{name}/likelihood_pmi/top1" in metrics:
        found += _of_pmi(f"{name}/likelihood_pmi", metrics[f"{name}/likelihood/images"])
    return found


def _of_caption_scores(metrics: Mapping[str, float], name: str) -> list[str]:
    found, count = [], metrics[f"{name}/images"]
    if not metrics[f"{name}/cider_defined"]:
        which = "is one image" if count == 1 else f"has the same references for all {count:g} images"
        found.append(
            f"{name}/cider is 0 whatever the captions are: words weigh more the fewer images have them, and nothing "
            f"where the set {which}"
        )
    if empty := metrics[f"{name}/empty"]:
        found.append(f"{name}: {empty:g} of {count:g} captions have no word; they score as 0")
    return found


def _of_pmi(name: str, images: float) -> list[str]:
    text = f"{name}: P(text) is the mean over the images, of which there is one; all texts tie, which counts as wrong"
    return [text] if images == 1 else []


def _count(count: float, things: str) -> str:
    return f"{count:g} {things}" if count != 1 else f"1 {things.removesuffix('es' if things == 'classes' else 's')}"
