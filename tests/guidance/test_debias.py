"""Words that contradict a view leave its prompt: the rule on a table, the probabilities on a small random BERT."""

import pytest
import torch

pytest.importorskip("transformers")

from text3d_fast.errors import ModelError
from text3d_fast.guidance.debias import WORDS, MaskedViews, debias
from text3d_fast.guidance.prompts import ViewPrompts

VOCABULARY = ["[PAD]", "[UNK]", "[MASK]", "this", "is", "a", "view", "of", "front", "side", "back", "overhead",
              "smiling", "dog"]


def table(texts):
    """A smile speaks for the front and against the back; nothing else matters."""
    return [{view: (0.6 if view == "front" else 0.1) if "smiling" in text else 0.2 for view in WORDS} for text in texts]


def test_words_against_a_view_are_left_out_of_its_prompt():
    texts = debias("a smiling dog", table)
    assert texts == {"front": "a smiling dog", "left": "a dog", "right": "a dog", "back": "a dog", "overhead": "a dog"}
    assert debias("smiling", table)["back"] == "smiling"  # one word stays
    views = ViewPrompts("side", texts=texts)
    assert views("a smiling dog", [0.0, 0.0], [0.0, 3.1]) == ["a smiling dog, front view", "a dog, back view"]
    assert set(views.all("a smiling dog")) == {
        "a smiling dog", "a smiling dog, front view", "a dog, back view", "a dog, side view", "a dog, overhead view"}
    assert views.negatives("a smiling dog", 1.0)["a dog, back view"] == {
        "a dog, side view": 1.0, "a smiling dog, front view": 1.0}


def save_bert(folder, vocabulary):
    import tokenizers
    import transformers

    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(
        {word: i for i, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", mask_token="[MASK]",
                                         pad_token="[PAD]", model_max_length=32).save_pretrained(folder)
    torch.manual_seed(0)
    transformers.BertForMaskedLM(transformers.BertConfig(
        vocab_size=len(vocabulary), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
    )).save_pretrained(folder)
    return folder


def test_probabilities_are_those_of_the_views_words_at_the_mask(tmp_path):
    views = MaskedViews(save_bert(tmp_path, VOCABULARY))
    found, other = views(["a dog", "a smiling dog"])
    ids = torch.tensor([[VOCABULARY.index(word) for word in ["this", "is", "a", "[MASK]", "view", "of", "a", "dog"]]])
    with torch.no_grad():
        logits = views.model(ids).logits[0, 3].double()
    words = ["front", "side", "back", "overhead"]
    shares = dict(zip(words, torch.softmax(logits[[VOCABULARY.index(word) for word in words]], 0).tolist()))
    assert found == pytest.approx({view: shares[word] for view, word in WORDS.items()})
    assert found != other


def test_other_models_are_answered_in_one_sentence(tmp_path):
    with pytest.raises(ModelError, match="debias: .*none cannot be loaded as a masked language model"):
        MaskedViews(tmp_path / "none")
    with pytest.raises(ModelError, match="debias: .* has no token for overhead"):
        MaskedViews(save_bert(tmp_path / "small", [word for word in VOCABULARY if word != "overhead"]))
