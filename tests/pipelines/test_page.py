"""Is the page self-contained, safe to open, and honest about what the sweep found?"""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser

import pytest

from pipelines import losses, page, table
from tests.results import result, whole

VOID = {"meta", "img", "source"}
IMAGES = {"perplexity_vs_sparsity": (b"<svg light/>", b"<svg dark/>")}
EVIL = '<script>alert("x")</script>$name'


class Reader(HTMLParser):
    """Collects elements and text, and fails on an element that is closed out of turn."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], ""
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        self.open += [] if tag in VOID else [tag]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


DENSE = result("d", policy="dense", target=None, perplexity=10.0)


def written(results, failures=(), absent=(), name="demo"):
    made = table.rows(results)
    return page.page(name, results, made, list(failures), list(absent), IMAGES, losses.verdict(made, {}))


def headline(*results):
    (sentence,) = page.headlines(table.rows([DENSE, *results]))
    return sentence


def test_every_element_is_closed_in_turn_and_no_placeholder_is_left():
    reader = Reader(written([DENSE, whole("l")], absent=["x"]))
    assert reader.open == []
    assert "$" not in reader.text


def test_data_stays_text_wherever_it_appears():
    evil = whole(EVIL, EVIL, EVIL, versions={EVIL: EVIL}, machine={"cpu": EVIL}, benchmark={"batch": EVIL})
    failure = {"trial": EVIL, "cause": EVIL, "log": EVIL, "step": EVIL}
    html = written([evil, evil], [failure], [EVIL], name=EVIL)
    reader = Reader(html)
    assert "script" not in reader.tags
    assert "<script" not in html
    assert reader.text.count(EVIL) >= 10
    assert not [value for key, value in reader.attributes if key.startswith("on")]


def test_the_page_asks_nobody_for_anything():
    html = written([DENSE, result("l")])
    assert not re.search(r"https?:|//|@import|url\(", re.sub(r"base64,[A-Za-z0-9+/=]+", "", html))
    sources = [value for key, value in Reader(html).attributes if key in ("src", "srcset", "href")]
    assert sources and all(value.startswith("data:image/svg+xml;base64,") for value in sources)


def test_each_plot_is_there_on_light_and_on_dark_paper():
    embedded = [base64.b64decode(data) for data in re.findall(r"base64,([A-Za-z0-9+/=]+)", written([DENSE]))]
    assert sorted(embedded) == sorted(IMAGES["perplexity_vs_sparsity"])


def test_the_table_of_the_page_is_the_table_of_the_terminal():
    made = table.rows([DENSE, result("l")])
    text = Reader(written([DENSE, result("l")])).text
    for column in table.columns(made):
        assert column.title in text
        assert all(table.cell(row, column) in text for row in made)


def test_the_headline_quotes_the_cost_of_each_rule_of_the_same_budget():
    ours = result("l", perplexity=10.21, tokens_per_second=150.0, tokens_per_second_dense=100.0)
    said = headline(ours, result("w", policy="window", perplexity=10.8), result("s", policy="strided", perplexity=11.0))
    assert said == (
        "At 80% of the context dropped, tiny keeps perplexity within 2.1% of dense fine-tuning; "
        "a window of the same budget costs 8.0%, strided blocks of the same budget cost 10.0%. "
        "It decodes at 1.50x the speed of dense in the same process."
    )


def test_the_headline_admits_that_learned_dropping_lost():
    said = headline(result("l", perplexity=12.0), result("w", policy="window", perplexity=10.8))
    assert "20.0% above dense" in said
    assert "a window of the same budget costs 8.0%, which is better" in said


def test_the_headline_says_where_a_rule_spent_another_budget():
    said = headline(result("l", sparsity=0.7), result("w", policy="window", perplexity=10.8))
    assert "At 70%" in said and "a window at 80% costs 8.0%" in said


def test_the_headline_never_picks_the_prettiest_learned_trial():
    said = headline(result("l5", target=0.5, perplexity=9.0), result("l8", perplexity=12.0))
    assert said.startswith("At 80%")


@pytest.mark.parametrize("perplexity", [9.0, 10.0, 10.4, 30.0])
def test_the_headline_states_the_excess_that_was_measured(perplexity):
    excess = perplexity / 10 - 1
    assert f"{abs(excess):.1%}" in headline(result("l", perplexity=perplexity))
    assert ("below" in headline(result("l", perplexity=perplexity))) == (excess < 0)


def test_the_headline_claims_nothing_without_the_rows_for_it():
    assert page.headlines(table.rows([result("l")])) == [
        "At 80% of the context dropped, tiny has perplexity 12.00; no dense trial has finished to compare with."
    ]
    assert headline() == "tiny: no learned trial has finished."


def test_failures_and_missing_trials_stand_above_the_results():
    html = written([DENSE], [{"trial": "w", "cause": "killed (signal 9)", "log": "w/log.txt", "step": 7}], ["x", "y"])
    text = Reader(html).text
    assert "1 of 4 trials finished" in text
    assert text.index("w failed at step 7: killed (signal 9) (log: w/log.txt)") < text.index("What was measured")
    assert "2 of the planned trials have not finished: x, y" in text


def test_what_was_lost_stands_in_a_section_of_its_own_on_the_page_and_in_its_twin():
    results = [DENSE, result("l", perplexity=12.0), result("w", policy="window", perplexity=10.8)]
    made = table.rows(results)
    verdict = losses.verdict(made, {})
    text, twin = Reader(written(results)).text, page.markdown("demo", results, made, [], [], verdict)
    assert len(verdict.found) == 1 and "11.1% worse than window" in verdict.found[0]
    for said in (text, twin):
        assert said.index("Where learned pruning does not win") < said.index(verdict.compared)
        assert said.index(verdict.compared) < said.index(verdict.found[0])


def test_a_page_without_losses_says_what_was_compared():
    html = written([DENSE, result("l", perplexity=10.0), result("w", policy="window", perplexity=10.8)])
    assert "Learned pruning lost none of these comparisons." in Reader(html).text
    assert "worse than window" not in html and "<ul></ul>" not in html


def test_layers_are_bars_of_their_sparsity_and_dense_has_none():
    html = written([DENSE, result("l", sparsity_per_layer=[0.25, None, 0.75])])
    assert re.findall(r"height:([\d.]+)%", html) == ["25.0", "0.0", "75.0"]
    assert "layer 1: 25%, layer 2: -, layer 3: 75%" in html
    assert "25% to 75%" in html


def test_each_machine_is_named_once():
    other = whole("b", machine={"cpu": "another cpu", "cores": 64, "gpu": "a gpu"})
    lines = page.conditions([whole("d", policy="dense"), whole("a"), other])
    assert [line for line in lines if line.startswith("Machine")] == [
        "Machine: a cpu, 2 cores, 8 GB memory, Linux",
        "Machine: another cpu, 64 cores, GPU a gpu",
    ]
    assert "Decoding: batch 32, 128 prompt tokens, 64 new tokens, 3 repeats" in lines


def test_one_seed_is_admitted():
    assert "one seed" in page.repeats(table.rows([result("a", seed=0)]))
    assert "one seed" not in page.repeats(table.rows([result("a", seed=0), result("b", seed=1)]))


def test_wide_tables_and_plots_scroll_inside_the_page_and_are_whole_on_paper():
    html = written([DENSE, whole("l")])
    assert re.search(r'<div class="scroll" tabindex="0"[^>]*><table>', html)
    screen, paper = html.split("@media print")
    for rule in (".scroll { overflow-x: auto; }", "picture { display: block; overflow-x: auto; }"):
        assert rule in screen
    assert ".scroll, picture { overflow: visible; }" in paper
    assert re.search(r"\.scroll td:first-child \{ position: sticky; left: 0;", screen), "names stay in sight"


def test_a_section_s_title_is_larger_than_one_inside_it():
    sizes = dict(re.findall(r"\n(h[123]) \{[^}]*font-size: ([\d.]+)rem", written([DENSE])))
    assert float(sizes["h1"]) > float(sizes["h2"]) > float(sizes["h3"])
