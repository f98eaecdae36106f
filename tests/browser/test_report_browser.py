"""The report as a person meets it: three sizes, light and dark, with a keyboard, with a screen reader's rules."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

FOCUS = """(e => e === document.body ? null
    : [(e.closest('figure') || e).getBoundingClientRect().top + scrollY, getComputedStyle(e).outlineStyle])
    (document.activeElement)"""
"""Where what has the focus is (figures stand in two columns: of what is in one, its top), and how it shows it."""


def test_opens_quietly_and_alone(page: Any) -> None:
    page.wait_for_load_state("networkidle")
    assert page.noise == []
    assert page.title().endswith("stage-by-stage latency")


def test_fits_the_window(page: Any) -> None:
    wide, window = page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
    assert wide <= window, "the page itself never scrolls sideways; tables and figures do so inside their own frames"
    escaped = page.evaluate(
        """() => [...document.querySelectorAll('main *')]
              .filter(e => !e.closest('.wide') && e.getBoundingClientRect().right > innerWidth + 1)
              .map(e => e.tagName + '.' + e.className)"""
    )
    assert escaped == []


def test_text_of_figures_is_inside_and_apart(page: Any) -> None:
    """No label is cut off at the figure's border, and no two axis labels of one figure cover each other."""
    cut = page.evaluate(
        """() => [...document.querySelectorAll('figure svg')].flatMap(svg => { const b = svg.getBoundingClientRect();
              return [...svg.querySelectorAll('text')].filter(t => { const r = t.getBoundingClientRect();
                  return t.textContent && getComputedStyle(t).opacity !== '0' && r.width
                      && (r.left < b.left - 2 || r.right > b.right + 2 || r.top < b.top - 2 || r.bottom > b.bottom + 2)})
                  .map(t => svg.closest('figure').id + ': ' + t.textContent)})"""
    )
    assert cut == []
    covered = page.evaluate(
        """() => [...document.querySelectorAll('figure svg')].flatMap(svg => {
              const texts = [...svg.querySelectorAll('text')].filter(t => t.textContent && t.getBoundingClientRect().width
                  && +getComputedStyle(t).opacity > 0 && t.getAttribute('opacity') !== '0');
              const hits = [];
              for (let i = 0; i < texts.length; i++) for (let j = i + 1; j < texts.length; j++) {
                  const a = texts[i].getBoundingClientRect(), b = texts[j].getBoundingClientRect();
                  const w = Math.min(a.right, b.right) - Math.max(a.left, b.left);
                  const h = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
                  if (w > 2 && h > 3) hits.push(svg.closest('figure').id + ': ' + texts[i].textContent + ' / ' + texts[j].textContent)}
              return hits})"""
    )
    assert covered == []


def test_keyboard_reaches_everything_in_order(page: Any) -> None:
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    assert page.evaluate("document.activeElement.getBoundingClientRect().left") >= 0, "shown once it has the focus"
    page.keyboard.press("Enter")
    assert page.evaluate("location.hash") == "#main"
    wanted = page.evaluate(
        """[...document.querySelectorAll('a[href], summary, [tabindex]')]
             .filter(e => e.matches('summary') || !e.closest('details:not([open])')).length"""
    )
    tops, seen = [], 0
    page.evaluate("document.activeElement.blur(); getSelection().removeAllRanges(); location.hash = ''")
    page.reload()
    for _ in range(wanted):
        page.keyboard.press("Tab")
        place = page.evaluate(FOCUS)
        if place is None:
            break
        seen += 1
        tops.append(place[0])
        assert place[1] != "none", "what has the focus shows it"
    assert seen == wanted
    assert sum(b < a - 400 for a, b in pairwise(tops[1:])) <= 3, "the focus goes down the page"


def test_a_table_scrolls_by_keyboard(page: Any) -> None:
    scroller = page.evaluate_handle("[...document.querySelectorAll('.wide')].find(e => e.scrollWidth > e.clientWidth + 20)")
    if not scroller.evaluate("e => !!e"):
        return  # everything fits at this size
    scroller.evaluate("e => e.focus()")
    page.keyboard.press("ArrowRight")
    page.wait_for_function("e => e.scrollLeft > 0", arg=scroller, timeout=3000)


def test_details_open_by_keyboard(page: Any) -> None:
    page.focus("#method summary")
    page.keyboard.press("Enter")
    assert page.evaluate("document.querySelector('#method details').open")


def test_what_a_folded_table_holds_is_reached_once_it_is_open(page: Any) -> None:
    page.focus("#distribution summary")
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.closest('#distribution .wide') !== null")


def test_links_to_sections_lead_there(page: Any) -> None:
    for target in page.evaluate("[...document.querySelectorAll('nav a')].map(a => a.getAttribute('href'))"):
        page.click(f"nav a[href='{target}']")
        assert abs(page.evaluate(f"document.querySelector('{target}').getBoundingClientRect().top")) < 900


@pytest.mark.parametrize("page", [("desktop", "light"), ("tablet", "dark"), ("phone", "dark")], ids="-".join, indirect=True)
def test_axe_finds_nothing_serious(page: Any, axe: str) -> None:
    page.add_script_tag(content=axe)
    found = page.evaluate("axe.run({exclude: [['svg']]}, {resultTypes: ['violations', 'passes']})")
    serious = [
        f"{v['id']} ({v['impact']}): {v['help']}: {v['nodes'][0]['html'][:120]}"
        for v in found["violations"]
        if v["impact"] in ("serious", "critical")
    ]
    assert serious == []
    assert len(found["passes"]) > 15, "the rules ran"


def test_pictures_are_shown(page: Any) -> None:
    widths = page.evaluate("[...document.querySelectorAll('.strip img')].map(i => i.naturalWidth)")
    assert widths and min(widths) > 20


def test_the_file_is_small_and_says_so(report: Path) -> None:
    assert report.stat().st_size < 3_000_000
