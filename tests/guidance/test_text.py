"""Long prompts: the words of the view stay."""

import pytest
import torch

pytest.importorskip("transformers")

from tiny_models import save_text_encoder

from text3d_fast.errors import ModelWarning
from text3d_fast.guidance.prompts import WORDINGS, ViewPrompts, split_view
from text3d_fast.guidance.text import TextEmbeddings, shorten

LONG = "a red mug , a blue chair , a red mug , a blue chair"


def load(folder):
    import transformers

    return (transformers.AutoTokenizer.from_pretrained(folder / "tokenizer"),
            transformers.CLIPTextModel.from_pretrained(folder / "text_encoder"))


def test_prompts_and_view_words_come_apart():
    for wording in WORDINGS:
        views = ViewPrompts(wording)
        assert all(split_view(text)[0] == "a mug" for text in views.all("a mug"))
    assert split_view("a mug, left side view") == ("a mug", ", left side view")
    assert split_view("a chair, oak") == ("a chair, oak", "")


def test_a_long_prompt_is_shortened_and_its_views_stay_apart(tmp_path):
    """12 tokens with start and end: all five view prompts were the same twelve."""
    save_text_encoder(tmp_path)
    tokenizer, encoder = load(tmp_path)
    texts = TextEmbeddings(lambda: (tokenizer, encoder), torch.device("cpu"), torch.float32)
    views = ViewPrompts("side").all(LONG)
    with pytest.warns(ModelWarning, match="longer than the 12 tokens that the model reads; of .* it is given 'a red"):
        embedded = texts(views)
    for i in range(1, len(views)):
        for j in range(i):
            assert not torch.allclose(embedded[i], embedded[j])
    with pytest.warns(ModelWarning):
        short = shorten(tokenizer, f"{LONG}, back view", 12)
    assert short == "a red mug , a blue chair, back view"
    assert len(tokenizer(short).input_ids) <= 12
    assert shorten(tokenizer, "a red mug, back view", 12) == "a red mug, back view"  # and no warning


@pytest.mark.filterwarnings("error")
def test_a_prompt_that_fits_is_left_alone(tmp_path):
    save_text_encoder(tmp_path)
    tokenizer, _ = load(tmp_path)
    assert shorten(tokenizer, "a mug", 12) == "a mug"
