"""Tables in notebooks hold texts, not markup."""

from __future__ import annotations

from fedmerge.system.notebook import html_table


def test_every_text_is_escaped() -> None:
    shown = html_table("a & b", ["<i>"], [["1 < 2"], ['"']])
    assert shown == (
        "<table><caption>a &amp; b</caption><thead><tr><th>&lt;i&gt;</th></tr></thead>"
        "<tbody><tr><td>1 &lt; 2</td></tr><tr><td>&quot;</td></tr></tbody></table>"
    )
