"""Solves for the details of the mean image: `python -m examples.train_toybox.details --data DIR --model DIR --out DIR`.

What the mean image lacks of the renders of a class, all seen from the same distance, is regressed on harmonics of the
camera, for each colour (ridge, stronger for higher ones); kept are the singular pictures that differ most between
opposite sides. Two minutes for 90,000 renders; `guidance.mean_image.Details` says why.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot, pixel_shuffle

from examples.train_toybox.dataset import RenderedImages
from examples.train_toybox.mean import lacking
from examples.train_toybox.model import DETAILED, UNSHUFFLE, ToyboxModel
from text3d_fast.guidance.prior import Conditions
from text3d_fast.toybox.captions import caption, training_caption, view_word
from text3d_fast.toybox.learned import WEIGHTS
from text3d_fast.toybox.learned.mean_image import frequencies, harmonics, nearness, zoomed
from text3d_fast.toybox.objects import CLASSES, COLORS
from text3d_fast.toybox.scenes import Description, random_description

RIDGE = 1e-3  # of 3e-4 .. 1e-2 the best on held-out renders for two of the four classes, near it for the others


def detailed(description: Description) -> bool:
    """Whether an image of this meaning has details: one object of such a class, shaded, of its usual size."""
    thing = description.thing
    return (
        thing.kind in DETAILED and description.base is None and description.style == "shaded" and thing.size is None
    )


def _samples(model: ToyboxModel, data: RenderedImages, rows: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
    """What the mean image lacks of these renders, [N, P], the harmonics of their cameras, and their colours [N]."""
    camera = torch.from_numpy(data.camera[rows])
    things = [data.descriptions[row].thing for row in rows]
    texts = [
        caption(Description(thing, None, view_word(float(c[0]), float(c[1]))))
        for thing, c in zip(things, camera, strict=True)
    ]
    conditions = Conditions(texts, camera, torch.full((len(rows), 3), 0.5))
    missing = pixel_shuffle(torch.cat(lacking(model, data, rows, conditions), 1), UNSHUFFLE)
    vector = model.condition_vector(conditions)
    side = model.mean_image.config.picture_side
    colors = torch.tensor([list(COLORS).index(thing.color) for thing in things])
    return zoomed(missing, 1 / nearness(vector), side).flatten(1).cpu(), harmonics(vector).cpu(), colors


def _regress(parts: Iterable[tuple[Tensor, Tensor, Tensor]], count: int) -> tuple[Tensor, Tensor]:
    """Amplitudes [colours, HARMONICS, count] and pictures [count, P], bytes, of the regression over parts of samples.

    The answer for a colour is one for all and a difference, both small: a colour that is never seen has the common one.
    """
    gram, moment, spread, seen = 0.0, 0.0, 0.0, 0
    for targets, waves, colors in parts:
        own = one_hot(colors, len(COLORS)).to(waves)[:, :, None] * waves[:, None]
        features = torch.cat([waves, own.flatten(1)], 1)
        gram, moment = gram + (features.T @ features).double(), moment + (features.T @ targets).double()
        spread, seen = spread + (waves.T @ waves).double(), seen + len(waves)
    gram, moment, spread = gram / seen, moment / seen, spread / seen
    turn, rise = frequencies()
    penalty = (1 + turn.square() + rise.square()).repeat(1 + len(COLORS))  # pictures change slowly with the camera
    answer = torch.linalg.solve(gram + RIDGE * torch.diag(penalty), moment).unflatten(0, (-1, len(turn)))
    answer = answer[0] + answer[1:]
    # the pictures that differ most between opposite sides, weighed by how the cameras are spread
    odd = turn % 2 == 1
    root = torch.linalg.cholesky(spread[odd][:, odd] + 1e-6 * torch.eye(int(odd.sum())))
    pictures = torch.linalg.svd((root.T @ answer[:, odd]).flatten(0, 1), full_matrices=False).Vh[:count]
    height = pictures.abs().amax(1)
    return answer @ pictures.T * height, (127 * pictures / height[:, None]).round().to(torch.int8)


def _fit_choice(model: ToyboxModel, count: int = 4096) -> None:
    """Teaches the details to tell from the text whose they are, if any, and in which colour: logistic regressions."""
    generator, none = torch.Generator().manual_seed(0), len(DETAILED)
    texts, labels = [""] * (count // 10), [(none, -100)] * (count // 10)  # -100: not asked for by cross_entropy
    for k in range(count):
        meaning = random_description(generator, kinds=tuple(DETAILED if k % 2 else CLASSES))
        angles = torch.rand(2, generator=generator) * torch.tensor([1.2, 6.2])
        texts.append(training_caption(meaning, *angles.tolist(), generator))
        thing = meaning.thing
        labels.append(
            (list(DETAILED).index(thing.kind), list(COLORS).index(thing.color)) if detailed(meaning) else (none, -100)
        )
    details = model.mean_image.details
    states = model.embed(model.token_ids(texts)).mean(1)
    truth = torch.tensor(labels, device=states.device)
    for layer, answers in zip((details.choice, details.color), truth.unbind(1), strict=True):
        optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=200, line_search_fn="strong_wolfe")

        def loss(optimizer=optimizer, layer=layer, answers=answers) -> Tensor:
            optimizer.zero_grad()
            value = cross_entropy(layer(states), answers) + 1e-6 * layer.weight.square().sum()
            value.backward()
            return value

        optimizer.step(loss)  # which takes gradients by itself


@torch.no_grad()
def fit_details(model: ToyboxModel, data: Sequence[RenderedImages], chunk: int = 256) -> None:
    """Solves for the details of the model's mean image, which must be trained already; replaces those it has.

    A class without renders of one shaded object of the usual size gets none. Raises ValueError if the model has no
    place for details.
    """
    details = model.mean_image.details
    if details is None:
        raise ValueError("model: its mean image has no place for details (`pictures` in mean_image/config.json)")
    details.amplitude.zero_()
    details.pictures.zero_()
    solved = {}
    for kind, count in DETAILED.items():
        rows = [
            np.array([k for k, d in enumerate(part.descriptions) if d.thing.kind == kind and detailed(d)], dtype=int)
            for part in data
        ]
        if any(map(len, rows)):
            parts = (
                _samples(model, part, some[k : k + chunk])
                for part, some in zip(data, rows, strict=True) for k in range(0, len(some), chunk)
            )
            solved[kind] = _regress(parts, count)
    # only now: what is drawn for one class must not change what the others lack
    counts = list(DETAILED.values())
    places = zip(DETAILED, details.amplitude.split(counts, 2), details.pictures.split(counts), strict=True)
    for kind, amplitude, pictures in places:
        if kind in solved:
            amplitude.copy_(solved[kind][0])
            pictures.copy_(solved[kind][1].view_as(pictures))
    _fit_choice(model)


def main() -> None:
    """The command line of `python -m examples.train_toybox.details`."""
    parser = argparse.ArgumentParser(description="Solve for the details of the mean image of a Toybox model.")
    parser.add_argument("--data", required=True, nargs="+", help="folders from python -m examples.train_toybox.dataset")
    parser.add_argument("--model", default=WEIGHTS, help="model folder (default: the shipped one)")
    parser.add_argument("--out", required=True, help="folder to write the model to")
    given = parser.parse_args()
    model = ToyboxModel.load(given.model)
    fit_details(model, [RenderedImages(folder) for folder in given.data])
    model.save(given.out)


if __name__ == "__main__":
    main()
