"""The page of report.html: a Jinja template (autoescaped) with its style sheet. No script, nothing from outside."""

from __future__ import annotations

STYLE = """
:root {
  color-scheme: light dark;
  --page: #f6f7f9; --card: #ffffff; --ink: #1b1e23; --ink-soft: #555c66; --line: #dfe2e7; --grid: #d9dde3;
  --accent: #1f5fbf; --bar: #d5e3f8; --good: #14713f; --good-soft: #e2f4e9; --warn: #8a4b00; --warn-soft: #fdf0dc;
  --series-1: #1f66c9; --series-2: #c2481a; --series-3: #0b7d58; --series-4: #7d49ac; --series-5: #946200;
  --series-6: #5b6470;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #121417; --card: #1b1e23; --ink: #e9ebee; --ink-soft: #a9b0ba; --line: #32373f; --grid: #363c45;
    --accent: #8db8ff; --bar: #243a5c; --good: #6fdc9f; --good-soft: #17352a; --warn: #f5c06f; --warn-soft: #3a2c14;
    --series-1: #74b0ff; --series-2: #ff9a6b; --series-3: #56d3a5; --series-4: #cba6f0; --series-5: #efc05a;
    --series-6: #aab2bd;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Liberation Sans", sans-serif;
}
header, main, footer { max-width: 1120px; margin: 0 auto; padding: 0 20px; }
header { padding-top: 36px; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 6px; letter-spacing: -0.01em; overflow-wrap: anywhere; }
h2 { font-size: 1.3rem; margin: 44px 0 6px; letter-spacing: -0.005em; }
h3 { font-size: 1rem; margin: 22px 0 10px; }
p { margin: 6px 0 14px; max-width: 76ch; }
.soft, figcaption, footer { color: var(--ink-soft); }
.soft, figcaption { font-size: 0.9rem; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.note { background: var(--warn-soft); color: var(--warn); border-radius: 10px; padding: 10px 16px; max-width: none; }
.tiles {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); gap: 12px; margin: 22px 0 12px;
}
.tiles > div { padding: 14px 16px; }
.tiles dt { color: var(--ink-soft); font-size: 0.86rem; }
.tiles dd { margin: 0; }
.tiles .value { font-size: 1.75rem; line-height: 1.25; font-weight: 650; font-variant-numeric: tabular-nums; }
.tiles .beside { color: var(--ink-soft); font-size: 0.86rem; }
.facts {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); gap: 0 28px; padding: 8px 18px; margin: 0;
}
.facts > div { display: flex; gap: 14px; padding: 7px 0; border-bottom: 1px solid var(--line); }
.facts dt { flex: 0 0 7.2em; color: var(--ink-soft); }
.facts dd { margin: 0; overflow-wrap: anywhere; min-width: 0; }
.scroll { overflow-x: auto; }
.scroll:focus-visible, summary:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding: 12px 14px 4px; color: var(--ink-soft); font-size: 0.9rem; }
th, td { padding: 7px 12px; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
thead th {
  white-space: normal; color: var(--ink-soft); font-weight: 600; font-size: 0.86rem;
  border-bottom: 1px solid var(--line);
}
thead th[colspan] { text-align: center; border-bottom: 0; padding-bottom: 0; }
tbody th { font-weight: 400; }
tbody + tbody th.group { border-top: 1px solid var(--line); }
th.group { padding-top: 12px; font-weight: 650; white-space: normal; }
th.group span { font-weight: 400; color: var(--ink-soft); font-size: 0.9rem; }
tr.model th, tr.model td { font-weight: 650; }
tr.rest th, tr.rest td { color: var(--ink-soft); }
td.measured {
  background: linear-gradient(90deg, var(--bar) var(--share), transparent var(--share)) no-repeat
    center / calc(100% - 8px) 74%;
}
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 14px; }
.charts figure { margin: 0; padding: 14px 14px 10px; }
.charts figcaption { margin-bottom: 6px; } .charts figcaption b { color: var(--ink); font-size: 1rem; display: block; }
.charts svg { display: block; width: 100%; height: auto; stroke-linejoin: round; stroke-linecap: butt; }
img { display: block; background: #fff; border-radius: 8px; border: 1px solid var(--line); object-fit: contain; }
.queries { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 300px), 1fr)); gap: 12px; }
.query { padding: 14px; min-width: 0; }
.query.wide { display: flex; gap: 14px; }
.query.wide > div { min-width: 0; }
.query img { width: 76px; height: 76px; }
.query ol { margin: 0 0 6px; padding-left: 1.5em; overflow-wrap: anywhere; font-size: 0.95rem; line-height: 1.4; }
.right { color: var(--good); font-weight: 650; }
.query h4 { margin: 0 0 8px; font-size: 1rem; overflow-wrap: anywhere; }
.query .row { display: grid; grid-template-columns: repeat(5, minmax(0, 1fr)); gap: 6px; list-style: none; padding: 0; }
.query .row img { width: 100%; height: auto; aspect-ratio: 1; }
.query .row .right img { outline: 3px solid var(--good); outline-offset: -1px; }
.query .row .mark { display: block; text-align: center; height: 1.3em; font-size: 0.85rem; }
.captions { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 220px), 1fr)); gap: 12px; }
.captions figure { margin: 0; padding: 14px; overflow-wrap: anywhere; }
.captions img { width: 96px; height: 96px; margin-bottom: 10px; }
.captions .said { color: var(--ink); font-size: 1rem; font-weight: 600; line-height: 1.35; }
.captions .exact .said { color: var(--good); }
.empty { font-style: italic; font-weight: 400; }
code { white-space: nowrap; background: var(--bar); border-radius: 4px; padding: 1px 6px; font-size: 0.88em; }
details { margin: 12px 0; }
summary { cursor: pointer; font-weight: 600; padding: 8px 0; }
pre { overflow-x: auto; padding: 14px 16px; font-size: 0.85rem; line-height: 1.45; margin: 6px 0; }
footer { font-size: 0.85rem; margin-top: 48px; padding-bottom: 40px; }
footer p { max-width: none; white-space: pre-line; overflow-wrap: anywhere; }
.hidden { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }
@media (max-width: 560px) {
  header, main, footer { padding-left: 14px; padding-right: 14px; }
  .tiles { grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 8px; } .tiles .value { font-size: 1.4rem; }
  th, td { padding: 6px 8px; font-size: 0.92rem; }
  .facts { grid-template-columns: 1fr; } .facts dt { flex-basis: 6em; }
  .captions { grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 8px; } .captions figure { padding: 10px; }
}
@media print { .card { break-inside: avoid; } body { background: #fff; } }
"""

TEMPLATE = """
{% macro picture(data, alt) -%}
{% if data %}<img src="{{ data }}" alt="{{ alt }}" width="76" height="76" loading="lazy">{% else -%}
<p class="soft">{{ alt }}: the picture cannot be decoded.</p>{% endif %}
{%- endmacro %}
{% macro tick(right, what="right") -%}
{% if right %} <span aria-hidden="true">&#10003;</span><span class="hidden">({{ what }})</span>{% endif %}
{%- endmacro %}
{% macro said(text) -%}
<bdi{% if not text.strip() %} class="empty">(empty){% else %}>{{ text }}{% endif %}</bdi>
{%- endmacro %}
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{{ title }}</title>
<style>{{ style }}</style>
</head>
<body>
<header>
<h1>{{ title }}</h1>
<p class="soft">{{ subtitle }}</p>
</header>
<main>
{% for note in notes %}<p class="note" role="note">{{ note }}</p>
{% endfor %}
{% if tiles %}<dl class="tiles">
{% for tile in tiles %}<div class="card"><dt>{{ tile.name }}</dt><dd class="value">{{ tile.value }}</dd>
<dd class="beside">{{ tile.beside }}</dd></div>
{% endfor %}</dl>{% endif %}
<section aria-labelledby="run"><h2 id="run">Run</h2>
<dl class="facts card">
{% for name, value in facts %}<div><dt>{{ name }}</dt><dd>{{ value }}</dd></div>
{% endfor %}</dl>
</section>

{% if charts %}<section aria-labelledby="curves"><h2 id="curves">Curves</h2>
<div class="charts">
{% for chart in charts %}<figure class="card"><figcaption><b>{{ chart.title }}</b>{{ chart.text }}</figcaption>
{{ chart.svg }}</figure>
{% endfor %}</div></section>{% endif %}

{% if recall %}<section aria-labelledby="retrieval"><h2 id="retrieval">Retrieval</h2>
<p>R@k: the share of queries with a right answer among the first k; ties count against the model. Median: the median
rank of the best right answer, where 1 is perfect.{% if has_pixels %} Nearest pixels looks up the training picture that
is nearest in RGB and answers with its text; it has learned nothing, so a model has to beat it.{% endif %} Chance is a
random ranking.</p>
<div class="card scroll" tabindex="0" role="region" aria-labelledby="retrieval">
<table><thead>
<tr><td></td><th colspan="4" scope="colgroup">image to text</th>
<th colspan="4" scope="colgroup">text to image</th></tr>
<tr><th scope="col">split</th>
{% for name in ("R@1", "R@5", "R@10", "median") * 2 %}<th scope="col">{{ name }}</th>{% endfor %}</tr></thead>
{% for split in recall %}<tbody>
<tr><th class="group" colspan="9" scope="rowgroup">{{ split.name }} <span>{{ split.size }}</span></th></tr>
{% for row in split.rows %}<tr class="{{ 'model' if loop.first else 'rest' }}"><th scope="row">{{ row.name }}</th>
{% for cell in row.cells %}
<td{% if cell.share %} class="measured" style="--share: {{ cell.share }}"{% endif %}>{{ cell.text }}</td>
{% endfor %}</tr>
{% endfor %}</tbody>
{% endfor %}</table></div></section>{% endif %}

{% for table in tables %}<section aria-labelledby="table{{ loop.index }}">
<h2 id="table{{ loop.index }}">{{ table.title }}</h2>
<p>{{ table.text }}{% for example in table.examples %} <code>{{ example }}</code>{% endfor %}</p>
<div class="card scroll" tabindex="0" role="region" aria-labelledby="table{{ loop.index }}">
<table><thead><tr>{% for name in table.head %}<th scope="col">{{ name }}</th>{% endfor %}</tr></thead><tbody>
{% for row in table.rows %}<tr class="{{ 'rest' if row.soft else 'model' }}"><th scope="row">{{ row.name }}</th>
{% for cell in row.cells %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div></section>
{% endfor %}

{% if classes %}<section aria-labelledby="classes"><h2 id="classes">Classes</h2>
<details><summary>Zero-shot accuracy within each of the {{ classes|length }} classes, the worst first</summary>
<div class="card scroll" tabindex="0" role="region" aria-labelledby="classes"><table>
<thead><tr>
{% for name in ("class", "called", "pictures", "top 1", "top 5") %}
<th scope="col">{{ name }}</th>{% endfor %}</tr></thead><tbody>
{% for row in classes %}<tr><th scope="row">{{ row.label }}</th><td>{{ row.names }}</td><td>{{ row.pictures }}</td>
{% for cell in row.cells %}
<td{% if cell.share %} class="measured" style="--share: {{ cell.share }}"{% endif %}>{{ cell.text }}</td>
{% endfor %}</tr>
{% endfor %}</tbody></table></div></details></section>{% endif %}

{% if gallery %}<section aria-labelledby="gallery"><h2 id="gallery">Retrieval gallery</h2>
<p>Queries evenly spaced through each split, not chosen by their result. The right answer is green and ticked.</p>
{% for split in gallery %}<details{{ ' open' if loop.first else '' }}><summary>{{ split.name }}</summary>
{% if split.images %}<h3>Image to text: the first five {{ split.what }}</h3>
<div class="queries">
{% for query in split.images %}<article class="query wide card">{{ picture(query.picture, query.text) }}
<div><ol>{% for answer in query.answers %}<li{% if answer.right %} class="right"{% endif %}>{{ said(answer.text) }}
{{- tick(answer.right) }}</li>{% endfor %}</ol>
<p class="soft">{{ query.rank }}{% if not query.found %}: {{ said(query.text) }}{% endif %}</p></div></article>
{% endfor %}</div>{% endif %}
{% if split.texts %}<h3>Text to image: the first five images</h3>
<div class="queries">
{% for query in split.texts %}<article class="query card"><h4>{{ said(query.text) }}</h4>
<ol class="row">{% for answer in query.answers %}<li{% if answer.right %} class="right"{% endif %}>
{{- picture(answer.picture, answer.text) }}
<span class="mark">{{ tick(answer.right) }}</span></li>{% endfor %}</ol>
<p class="soft">{{ query.rank }}</p></article>
{% endfor %}</div>{% endif %}
</details>
{% endfor %}</section>{% endif %}

{% if captions %}<section aria-labelledby="captions"><h2 id="captions">Generated captions</h2>
<p>{{ captions.text }}</p>
<div class="captions">
{% for caption in captions.shown %}<figure class="card{{ ' exact' if caption.exact else '' }}">
{{ picture(caption.picture, caption.reference) }}
<figcaption><span class="said">{{ said(caption.text) }}{{ tick(caption.exact, "exact") }}</span><br>
Reference: {{ said(caption.reference) }}</figcaption></figure>
{% endfor %}</div></section>{% endif %}

<section aria-labelledby="all"><h2 id="all">Everything else</h2>
{% if metrics %}<details><summary>All metrics</summary>
<div class="card scroll" tabindex="0" role="region" aria-label="All metrics"><table>
<thead><tr><th scope="col">metric</th><th scope="col">newest value</th></tr></thead><tbody>
{% for name, value in metrics %}<tr><th scope="row">{{ name }}</th><td>{{ value }}</td></tr>
{% endfor %}</tbody></table></div></details>{% endif %}
<details><summary>Configuration</summary>
<pre class="card" tabindex="0">{{ config }}</pre></details>
</section>
</main>
<footer>
{% if attribution %}<p>{{ attribution }}</p>{% endif %}
<p>Written by coca_jax {{ date }}. One file: it opens from disk and loads nothing.</p>
</footer>
</body>
</html>
"""
