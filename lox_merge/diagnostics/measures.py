"""One matrix of an inspection: everything that is computed from its weights, once, for figures and groups to be read from."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lox_merge.diagnostics.settings import InspectSettings
from lox_merge.jobs.noise import PLAIN, RoundingNoise
from lox_merge.jobs.work import form_delta
from lox_merge.maths.geometry import Products, inner_products, leading_count, mode_subspace_overlap, squared_overlaps
from lox_merge.maths.pieces import rows_at_once
from lox_merge.maths.precision import frobenius_norm, full_precision_matmul
from lox_merge.maths.random_subspace import haar_basis
from lox_merge.maths.rank import RankRule
from lox_merge.maths.spectral import truncated_svd
from lox_merge.maths.subspace import Certificate, Subspace


@dataclass(frozen=True)
class Spectrum:
    """squares: (j,) float64 squared singular values, descending. total: ‖Δ‖². following: the next singular value if known.

    complete: no direction above working precision is missing. of: the short side. noise_edge: what rounding of the models'
    weights alone would give.
    """

    squares: Tensor
    total: float
    following: float | None
    complete: bool
    of: int
    noise_edge: float
    certificate: Certificate

    def energy(self, count: int) -> float | None:
        """‖Proj_count(Δ)‖²; None where that many were not computed."""
        return leading_sum(self.squares, count, self.complete)


@dataclass(frozen=True)
class Overlap:
    """MSO at one energy. None where a spectrum was not computed far enough to say which directions hold it, or (not defined) is zero."""

    first: int | None
    second: int | None
    value: float | None
    defined: bool


@dataclass(frozen=True)
class Update:
    """Δ_ft of one fine-tuned model, seen from Δ_align.

    kept, kept_total: (j,) float64 energies of Δ_ft and of Δ_align + Δ_ft in each direction of Δ_align. drawn_total: (draws,) energy of
    the sum in random subspaces. overlaps: with Δ_align, one per η.
    """

    spectrum: Spectrum
    products: Products
    kept: Tensor
    kept_total: Tensor
    drawn_total: Tensor
    overlaps: tuple[Overlap, ...]


@dataclass(frozen=True)
class Measures:
    """All of one matrix. dimension: of the space in which the subspaces lie. rank: k of R_align, clipped to what Δ_align has.

    drawn: (draws,) energy of Δ_align in random subspaces. pairs: overlaps between updates i < j. bad: NaN and Inf per model that
    was subtracted from another ('aligned', then fine-tuned models by place); where there are any, nothing else holds.
    """

    rank: int = 0
    dimension: int = 0
    weight_norm: float = 0.0
    spectrum: Spectrum | None = None
    drawn: Tensor | None = None
    updates: tuple[Update, ...] = ()
    pairs: tuple[tuple[int, int, tuple[Overlap, ...]], ...] = ()
    bad: tuple[int, ...] = ()


def leading_sum(values: Tensor, count: int, complete: bool) -> float | None:
    """Sum of the first `count` values, of all where there are no more; None where more were needed."""
    return float(values[:count].sum()) if complete or count <= values.numel() else None


def measure(
    base: Tensor,
    aligned: Tensor,
    finetuned: Sequence[Tensor],
    settings: InspectSettings,
    *,
    label: str,
    transposed: bool,
    device: torch.device,
    noises: Sequence[RoundingNoise] | None = None,
    known: tuple[Subspace, bool] | None = None,
) -> Measures:
    """Measures one matrix. base, aligned, finetuned: (rows, columns) as they are read, any float dtype.

    label: name of the matrix, which its random draws depend on. transposed: stored (d_in, d_out). noises: of Δ_align, then of every
    fine-tuned model's update; None for plain dtypes. known: leading triplets of Δ_align
    computed before, and whether they are all there are. Raises NumericalError.
    """
    base, aligned = base.to(device), aligned.to(device)
    noises = [PLAIN] * (1 + len(finetuned)) if noises is None else noises
    delta, norm, bad = form_delta(base, aligned)
    edge = 0.0 if bad else noises[0].edge(base, aligned, delta)
    del base
    flip = (settings.side == "right") != transposed
    counts, updates = [bad], list[Update]()
    spans: list[tuple[Tensor, Spectrum]] = []
    with full_precision_matmul(device):
        frame = None if bad else _Frame.of(delta, edge, norm, settings, label, flip, known)
        for stored, noise in zip(finetuned, noises[1:], strict=True):
            other = stored.to(device)
            change, size, bad = form_delta(aligned, other, slot=1)
            counts.append(bad)
            if frame is None or any(counts):
                continue
            subspace, spectrum = _decompose(change, noise.edge(aligned, other, change), size, settings)
            span = subspace.right if flip else subspace.left
            updates.append(frame.update(change, size, spectrum, _overlaps((frame.basis, frame.spectrum), (span, spectrum), settings.etas)))
            if len(finetuned) > 1:
                spans.append((span, spectrum))
        if frame is None or any(counts):
            return Measures(bad=tuple(counts))
        numbered = list(enumerate(spans))
        pairs = tuple((i, j, _overlaps(one, other_span, settings.etas)) for i, one in numbered for j, other_span in numbered[i + 1 :])
    return Measures(
        rank=frame.rank,
        dimension=delta.shape[1] if flip else delta.shape[0],
        weight_norm=frobenius_norm(aligned),
        spectrum=frame.spectrum,
        drawn=frame.by_draw(frame.drawn),
        updates=tuple(updates),
        pairs=pairs,
        bad=tuple(counts),
    )


@dataclass(frozen=True)
class _Frame:
    """Δ_align of one matrix and the directions that others are measured against.

    basis: (d, j) its leading singular vectors of the wanted side; scaled: (j, n) s_i times those of the other side. random: (d, draws·k)
    Haar-random bases side by side, None for k = 0; drawn: their coefficients of Δ_align.
    """

    delta: Tensor
    spectrum: Spectrum
    basis: Tensor
    scaled: Tensor
    flip: bool
    rank: int
    draws: int
    random: Tensor | None
    drawn: Tensor | None

    @classmethod
    def of(
        cls, delta: Tensor, edge: float, norm: float, settings: InspectSettings, label: str, flip: bool, known: tuple[Subspace, bool] | None
    ) -> _Frame:
        subspace, spectrum = _decompose(delta, edge, norm, settings, known)
        basis, other = (subspace.right, subspace.left) if flip else (subspace.left, subspace.right)
        scaled = (other * subspace.singular_values.to(other)).T
        rank = min(settings.rank_of(min(delta.shape)), subspace.rank)
        random = drawn = None
        if rank:
            digest = hashlib.sha256(f"{settings.seed}:{label}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
            random = torch.cat([haar_basis(basis.shape[0], rank, generator) for _ in range(settings.draws)], 1).to(delta.device)
            drawn = _coefficients(random, delta, flip)
        return cls(delta, spectrum, basis, scaled, flip, rank, settings.draws, random, drawn)

    def by_draw(self, coefficients: Tensor | None) -> Tensor:
        """(draws,) energies; empty where nothing was drawn."""
        return torch.zeros(0, dtype=torch.float64) if coefficients is None else _energies(coefficients).view(self.draws, -1).sum(1)

    def update(self, change: Tensor, size: float, spectrum: Spectrum, overlaps: tuple[Overlap, ...]) -> Update:
        """Δ_ft as it stands to this frame. size: its norm."""
        norm = math.sqrt(self.spectrum.total)
        if size == 0:  # the same weights: exactly the energies of Δ_align, not those of a product
            nothing = torch.zeros_like(self.spectrum.squares)
            products = Products(aligned=norm**2, total=norm**2)
            return Update(spectrum, products, nothing, self.spectrum.squares, self.by_draw(self.drawn), overlaps)
        product, total = inner_products(self.delta, change, rows_at_once(change))
        kept = _coefficients(self.basis, change, self.flip)
        drawn = None if self.random is None or self.drawn is None else self.drawn + _coefficients(self.random, change, self.flip)
        # Q^T Δ_align is s_i v_i^T by construction, so that projecting the sum costs no further product.
        kept_total = _energies(kept + self.scaled)
        return Update(spectrum, Products(norm**2, size**2, product, total**2), _energies(kept), kept_total, self.by_draw(drawn), overlaps)


def _decompose(
    delta: Tensor, edge: float, norm: float, settings: InspectSettings, known: tuple[Subspace, bool] | None = None
) -> tuple[Subspace, Spectrum]:
    """The leading triplets of a delta and its spectrum. edge: singular values below it may be rounding alone."""
    if known is not None:
        found, complete = known
        subspace = replace(found, left=found.left.to(delta.device), right=found.right.to(delta.device))
    else:
        short = min(delta.shape)
        count = settings.triplets_of(short)
        rule = RankRule("percent", 100) if count == short else RankRule("fixed", count)
        subspace = truncated_svd(delta, rule, tolerance=settings.tolerance, seed=settings.seed)
        complete = subspace.rank < count or subspace.rank == short
    following = 0.0 if complete else subspace.certificate.next_singular_value
    squares = subspace.singular_values.square()
    return subspace, Spectrum(squares, norm**2, following, complete, min(delta.shape), edge, subspace.certificate)


def _coefficients(basis: Tensor, matrix: Tensor, flip: bool) -> Tensor:
    """Q^T M, or Q^T M^T: (k, n), one row for each direction of the basis."""
    return (matrix @ basis).T if flip else basis.T @ matrix


def _energies(coefficients: Tensor) -> Tensor:
    """(k,) float64 on the CPU."""
    norms: Tensor = torch.linalg.vector_norm(coefficients, dim=1)
    return norms.double().square().cpu()


def _overlaps(first: tuple[Tensor, Spectrum], second: tuple[Tensor, Spectrum], etas: Sequence[float]) -> tuple[Overlap, ...]:
    """MSO at every η. first, second: leading vectors (d, j) and their spectrum."""
    squared: Tensor | None = None
    found = []
    defined = first[1].total > 0 and second[1].total > 0
    for eta in etas:
        i, j = (leading_count(spectrum.squares, spectrum.total, eta) for _, spectrum in (first, second))
        if i is None or j is None:
            found.append(Overlap(i, j, None, defined))
            continue
        if squared is None:
            squared = squared_overlaps(first[0], second[0])
        # Bases are orthonormal to working precision only, so the share of a subspace in itself may come out above all of it.
        found.append(Overlap(i, j, min(1.0, mode_subspace_overlap(squared, i, j)), defined))
    return tuple(found)
