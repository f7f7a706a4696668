"""swaps.py: who is whose neighbour, that each signal reaches the mask, that a model is left as it was, the table."""

import math

import pytest
import swaps
import torch
from test_contract import FILES, batch, build, settings

import data
import models

every_paper = pytest.mark.parametrize("name", FILES)


def logits(model, one):
    with torch.no_grad():
        return model(one["images"], one["tokens"], one["text_mask"], one["image_index"])["logits"]


def masks_of(model, one, signal, change):
    handles = swaps.hooked(model, signal, change)
    assert handles, signal.name
    try:
        return logits(model, one)
    finally:
        for handle in handles:
            handle.remove()


@pytest.fixture
def run(monkeypatch):
    """A tiny CroBIM-U as evaluate.py hands it over."""
    paper = models.paper("crobim_u")
    tokenizer = models.word_tokenizer("crobim_u", paper.Config.tiny(), data.vocabulary("synthetic", []))
    torch.manual_seed(0)
    model = models.build("crobim_u", paper.Config(**{**vars(paper.Config.tiny()), "vocab_size": len(tokenizer)})).eval()
    model.tokenizer, model.run = tokenizer, {"model": "crobim_u", "dataset": "synthetic",
                                             "recipe": paper.RECIPE | paper.RECIPE_TINY}
    monkeypatch.setattr(swaps.evaluate, "load_model", lambda args, device: (model, model.run, "", None))
    return model


def test_neighbours_are_another_sentence_of_the_picture_and_one_of_the_next_picture():
    sentence, picture = swaps.elsewhere(torch.tensor([0, 0, 0, 1, 1, 2]))
    assert sentence.tolist() == [2, 0, 1, 4, 3, 5]
    assert picture.tolist() == [3, 4, 3, 5, 5, 0]


def test_no_batch_holds_one_picture_alone():
    assert swaps.pairs([1, 2, 3, 4, 5]) == [[1, 2], [3, 4, 5]]
    assert swaps.pairs([1, 2]) == [[1, 2]]


@every_paper
def test_each_signal_is_there_and_reaches_the_mask(name):
    config, _ = settings(name)
    model, one = build(name, config), batch(name, config)
    before = logits(model, one)
    for signal in swaps.SIGNALS[name]:
        assert torch.equal(masks_of(model, one, signal, lambda x: x), before), signal.name
        assert not torch.equal(masks_of(model, one, signal, lambda x: x + torch.randn_like(x)), before), signal.name
    assert torch.equal(logits(model, one), before)


def test_of_the_prompts_that_stand_before_the_words_only_they_change():
    config, _ = settings("icipnet")
    model, signal, seen = build("icipnet", config), swaps.SIGNALS["icipnet"][0], []
    hook = model.stages[0].icip.register_forward_hook(lambda module, args, output: seen.append(output[0]))
    one = batch("icipnet", config)
    logits(model, one)
    hook.remove()
    handles = swaps.hooked(model, signal, torch.zeros_like)
    model.stages[0].icip.register_forward_hook(lambda module, args, output: seen.append(output[0]))
    logits(model, one)
    assert handles and seen[1][:, :config.prompts].eq(0).all() and seen[0][:, :config.prompts].ne(0).any()
    assert torch.equal(seen[0][:, config.prompts:], seen[1][:, config.prompts:])


def test_true_masks_stand_in_for_a_signal_that_is_one():
    config, _ = settings("rs2sam2")
    one, signal = batch("rs2sam2", config), next(one for one in swaps.SIGNALS["rs2sam2"] if one.mask)
    truth = swaps.changes(signal, one)["truth"](torch.zeros(3, 1, 8, 8))
    assert torch.allclose(truth.mean((1, 2, 3)), one["masks"].float().mean((1, 2)))


def test_a_row_for_every_signal_and_the_score_that_evaluate_gives(run, capsys):
    swaps.main(["--checkpoint", "RUN", "--limit", "24"])
    title, head, *rows = capsys.readouterr().out.rstrip("\n").split("\n")
    samples = data.read("synthetic", "", "test", limit=24)
    lines = swaps.evaluate.evaluate(run, samples, swaps.evaluate.start_processes("cpu"), tokenizer=run.tokenizer,
                                    protocol="resized", workers=0)
    assert math.isclose(float(title.split()[-1]), 100 * sum(line["iou"] for line in lines) / 24, abs_tol=0.006)
    assert head.split() == list(swaps.COLUMNS) and len(rows) == len(swaps.SIGNALS["crobim_u"])
    assert all(len(row.rsplit(")", 1)[1].split()) == 3 for row in rows)


def test_one_picture_alone_is_refused(run):
    with pytest.raises(ValueError, match="12 samples of one picture"):
        swaps.main(["--checkpoint", "RUN", "--limit", "12"])


def test_a_paper_without_named_signals_is_refused(run):
    run.run["model"] = "toy"
    with pytest.raises(ValueError, match="no signals of toy"):
        swaps.main(["--checkpoint", "RUN"])
