"""DeepFloyd IF's kind: a T5 whose tokenizer is a sentencepiece file, as its repository has it."""

import shutil

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("sentencepiece")

import sentencepiece
from tiny_models import save_model

from text3d_fast.guidance import Conditions, DiffusionPrior, open_model
from text3d_fast.guidance.models.loading import load_tokenizer

WORDS = ["a red mug", "a blue chair", "front view", "back view", "side view", "overhead view", "a photo of a corgi"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    import transformers

    folder = save_model(tmp_path_factory.mktemp("models") / "if", latent=False,
                        unet={"in_channels": 3, "out_channels": 6, "encoder_hid_dim": 24,
                              "encoder_hid_dim_type": "text_proj"})
    for part in ("tokenizer", "text_encoder"):
        shutil.rmtree(folder / part)
    (folder / "tokenizer").mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(WORDS * 20), model_prefix=str(folder / "tokenizer" / "spiece"), vocab_size=40,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, hard_vocab_limit=False, minloglevel=2)
    (folder / "tokenizer" / "spiece.vocab").unlink()
    (folder / "tokenizer" / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "T5Tokenizer", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>", '
        '"extra_ids": 0, "model_max_length": 77}')
    transformers.T5EncoderModel(transformers.T5Config(
        vocab_size=160, d_model=24, d_kv=4, d_ff=32, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu",
    )).save_pretrained(folder / "text_encoder")
    return folder


def test_the_tokenizer_is_the_sentencepiece_models(folder):
    tokenizer = load_tokenizer(open_model(folder))
    truth = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer" / "spiece.model"))
    for text in WORDS:
        assert tokenizer(text).input_ids == [*truth.encode(text), 1]  # and the end


def test_it_loads_and_hears_the_text(folder):
    prior = DiffusionPrior.from_pretrained(folder)
    x_t, t = torch.randn(1, 3, 16, 16), torch.tensor([0.5])
    answers = [prior.predict_noise(x_t, t, Conditions([text])) for text in ("a red mug", "a blue chair")]
    assert answers[0].shape == x_t.shape and not torch.allclose(*answers, atol=1e-4)
