"""On which images methods say different classes: where a reader learns most by looking."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray


def vote_entropy(answers: NDArray[np.int64]) -> NDArray[np.float64]:
    """How far methods are apart on each image: the entropy of their votes.

    Parameters
    ----------
    answers : NDArray[np.int64]
        (M, N), the class that each of M methods says.

    Returns
    -------
    NDArray[np.float64]
        (N,), nats; 0 where all say one class.

    Examples
    --------
    >>> import numpy as np
    >>> from fedmerge.report.metrics.disagreement import vote_entropy
    >>> answers = np.array([[0, 0, 1], [0, 0, 1], [1, 0, 1], [1, 1, 1]])
    >>> vote_entropy(answers).round(3).tolist()  # two against two is ln 2
    [0.693, 0.562, 0.0]
    """
    methods, images = answers.shape
    found = np.zeros(images)
    for said in range(int(answers.max(initial=-1)) + 1):
        share = (answers == said).sum(0) / max(1, methods)
        found -= np.where(share > 0, share * np.log(np.where(share > 0, share, 1.0)), 0.0)
    return np.abs(found.round(12))


def most_apart(answers: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Images on which methods are furthest apart; of images that are equally far, those that lie evenly along the stream.

    Parameters
    ----------
    answers : NDArray[np.int64]
        (M, N), the class that each of M methods says.
    count : int
        How many, at most.

    Returns
    -------
    NDArray[np.int64]
        Places in the stream, in order; none where all agree.

    Examples
    --------
    >>> import numpy as np
    >>> from fedmerge.report.metrics.disagreement import most_apart
    >>> answers = np.array([[0, 0, 1], [0, 0, 1], [1, 0, 1], [1, 1, 1]])
    >>> most_apart(answers, count=1).tolist()
    [0]
    """
    score = vote_entropy(answers)
    places = np.flatnonzero(score > 0)
    if len(places) > count:
        least = np.sort(score[places])[-count] if count else np.inf
        further, equal = places[score[places] > least], places[score[places] == least]
        room = count - len(further)
        evenly = equal[np.linspace(0, len(equal) - 1, room).round().astype(np.int64)] if room else equal[:0]
        places = np.sort(np.concatenate([further, evenly]))
    return places.astype(np.int64)


def votes(
    names: Iterable[str], samples: int, probabilities: Callable[[str], NDArray[np.float32]]
) -> tuple[list[str], NDArray[np.int64]]:
    """Who votes, and the votes: methods that cover every image, and are no single expert.

    Parameters
    ----------
    names : Iterable[str]
        Rows of the table.
    samples : int
        Images of the stream.
    probabilities : Callable[[str], NDArray[np.float32]]
        Takes a row's name, and gives its predictions (N, C).

    Returns
    -------
    tuple[list[str], NDArray[np.int64]]
        Names, and votes (M, samples).

    Examples
    --------
    >>> import numpy as np
    >>> from fedmerge.report.metrics.disagreement import votes
    >>> p = {"mean": np.float32([[0.9, 0.1]]), "eam": np.float32([[0.2, 0.8]]), "expert:axial": np.float32([[0.9, 0.1]])}
    >>> names, said = votes(p, samples=1, probabilities=p.__getitem__)
    >>> names, said.tolist()
    (['mean', 'eam'], [[0], [1]])
    """
    found = {}
    for name in names:
        if not name.startswith("expert"):
            said = probabilities(name).argmax(1)
            if len(said) == samples:
                found[name] = said.astype(np.int64)
    return list(found), np.stack(list(found.values())) if found else np.zeros((0, samples), np.int64)
