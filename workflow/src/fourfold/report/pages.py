"""HTML pages of the report: the tables by themselves, and the overview. No external resources, light and dark."""

from typing import Any

import jinja2
from markupsafe import Markup

from fourfold.report.page_style import STYLE

MACROS = """
{% macro comparison(rows, headings, notes, fastest) %}
<div class="scroll"><table>
<thead><tr>{% for key, heading in headings.items() %}
<th{% if key == "engine" %} class="name"{% endif %}>{{ heading | replace("Speed-up", "Speed\u2011up") }}</th>
{% endfor %}</tr></thead>
<tbody>{% for row in rows %}
<tr{% if not loop.first and row.concurrency != loop.previtem.concurrency %} class="group"{% endif %}>
{% for key in headings %}
<td{% if key == "engine" %} class="name"
{%- elif key == "speedup" and (row.concurrency, row.engine) in fastest %} class="best"
{%- elif key == "gate" %} class="{{ row[key] }}"{% endif %}>
{{- row[key] }}</td>{% endfor %}</tr>{% endfor %}
</tbody></table></div>
{% for note in notes %}<p class="notes">{{ note }}</p>{% endfor %}
{% endmacro %}
{% macro gate_table(rows, headings, notes) %}
<div class="scroll"><table class="gate">
<thead><tr>{% for heading in headings.values() %}<th>{{ heading }}</th>{% endfor %}</tr></thead>
<tbody>{% for row in rows %}<tr{% if not loop.first and row.engine != loop.previtem.engine %} class="group"{% endif %}>
{% for key in headings %}
<td class="{{ row.verdict if key == "verdict" else key }}">{{ row[key] }}</td>{% endfor %}</tr>{% endfor %}
</tbody></table></div>
{% for note in notes %}<p class="notes">{{ note }}</p>{% endfor %}
{% endmacro %}
{% macro plain_table(rows, headings) %}
<div class="scroll"><table>
<thead><tr>{% for key, heading in headings.items() %}
<th{% if key == "engine" %} class="name"{% endif %}>{{ heading }}</th>{% endfor %}</tr></thead>
<tbody>{% for row in rows %}<tr>{% for key in headings %}
<td{% if key == "engine" %} class="name"{% endif %}>{{ row[key] }}</td>{% endfor %}</tr>{% endfor %}</tbody>
</table></div>
{% endmacro %}
{% macro facts(rows) %}
<div class="scroll"><table class="facts">
<thead><tr><th></th>{% for row in rows %}<th>{{ row.engine }}</th>{% endfor %}</tr></thead>
<tbody>{% for key in rows[0] if key != "engine" %}
<tr><th>{{ key }}</th>{% if rows | map(attribute=key) | unique | list | length == 1 and rows | length > 1 %}
<td colspan="{{ rows | length }}">{{ rows[0][key] }}</td>{% else %}
{% for row in rows %}<td>{{ row[key] }}</td>{% endfor %}{% endif %}</tr>{% endfor %}
</tbody></table></div>
{% endmacro %}
"""

PAGE = (
    MACROS
    + """<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title><style>{{ style }}</style></head>
<body>
{% block body %}{% endblock %}
</body></html>
"""
)

TABLE1 = """{% extends "page" %}{% block body %}<h2>{{ title }}</h2>
{{ comparison(rows, headings, notes, fastest) }}{% endblock %}"""

GATE = """{% extends "page" %}{% block body %}<h2>{{ title }}</h2>
{% if rows %}{{ gate_table(rows, headings, notes) }}{% else %}
<p class="muted">A single engine in bf16: there is nothing to compare it with.</p>{% endif %}{% endblock %}"""

PROVENANCE = """{% extends "page" %}{% block body %}<h2>{{ title }}</h2>
{% for warning in warnings %}<p class="warning">{{ warning }}</p>{% endfor %}
{{ facts(rows) }}{% endblock %}"""

OVERVIEW = """{% extends "page" %}{% block body %}
<header><h1>{{ title }}</h1>
<p class="verdict">{{ verdict }}</p>
{% if gate %}<p class="banner {{ gate }}">{{ gate_sentence }}</p>{% endif %}
<p class="muted">{{ source }}</p></header>
{% for warning in warnings %}<p class="warning">{{ warning }}</p>{% endfor %}
{% if tiles %}<div class="tiles">{% for value, label in tiles %}
<div class="tile"><b>{{ value }}</b><span>{{ label }}</span></div>{% endfor %}</div>{% endif %}
<section><h2>Comparison</h2>{{ comparison(table1, headings, notes, fastest) }}</section>
{% if rates %}<section><h2>Requests at a rate</h2>{{ plain_table(rates, rate_headings) }}</section>{% endif %}
{% if checks %}<section><h2>Accuracy gate</h2>
{{ gate_table(checks, check_headings, check_notes) }}</section>{% endif %}
<section><h2>Plots</h2>{% for plot in plots %}
<figure><div>{{ plot.svg }}</div><figcaption>{{ plot.caption }}</figcaption></figure>{% endfor %}</section>
{% if samples %}<section><h2>The same problems, side by side</h2>
<p class="muted">The first answer of each engine to the first problems, one seed for all engines.</p>
{% for sample in samples %}<div class="sample"><div>{{ sample.problem }}</div>
<div class="muted">Expected answer: {{ sample.answer }}</div>
<div class="answers">{% for answer in sample.answers %}<div class="answer">
<div><b>{{ answer.engine }}</b> · {% if answer.correct %}<span class="right">✓ {{ answer.answer }}</span>
{%- elif answer.finish_reason == "length" %}<span class="wrong">✗ cut at the token limit</span>
{%- else %}<span class="wrong">✗ {{ "no answer" if answer.answer is none else answer.answer }}</span>
{%- endif %}</div>
<div class="muted">{{ answer.output_tokens }} tokens in {{ "%.2f" | format(answer.e2e_latency) }} s</div>
<pre>{{ answer.text }}</pre></div>{% endfor %}</div></div>{% endfor %}</section>{% endif %}
<section><h2>What made these numbers</h2>{{ facts(provenance) }}</section>
<section><h2>Definitions</h2><dl>{% for term, meaning in definitions.items() %}
<dt>{{ term }}</dt><dd>{{ meaning }}</dd>{% endfor %}</dl></section>
{% endblock %}"""

_PAGES = {"page": PAGE, "table1": TABLE1, "gate": GATE, "provenance": PROVENANCE, "overview": OVERVIEW}
_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.DictLoader(_PAGES), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
)


def render(page: str, **values: Any) -> str:
    """A page as HTML text; values are escaped unless they are marked as markup.

    Args:
        page: `table1`, `gate`, `provenance` or `overview`.
        values: what the page's template names.
    """
    return _ENVIRONMENT.get_template(page).render(style=Markup(STYLE), **values)
