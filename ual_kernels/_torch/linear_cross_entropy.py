"""Cross entropy of hidden states and a head in PyTorch, for any device; the fast path on a CPU.

The logits of a token are z = scale (e C^T + u B^T + b), a sum of products left @ right^T: hidden state and
head, LoRA's u = lora_scale e A^T and B, one and the bias. Each chunk of tokens is processed in tiles of the
vocabulary. One tile of logits is computed at a time and fits a CPU's cache:

    k      = max(k, max z)                  x = exp(z - k), 0 in the target's column
    others = others exp(k' - k) + sum x     X = X exp(k' - k) + x @ right        (k' is the previous k)

With y the target, cbar = mean_v c_v right_v and the terms of `_tokens`, after the last tile

    total = others + exp(z_y - k)      nll = log(1 + others / exp(z_y - k))      rest = others / total
    mean(c z) = scale sum of left . cbar
    dleft  = scale ((K / total) X + (U + (1 - s) (W - w_y) - K rest) right_y - s cbar)
    dright = scale (x^T diag(K / total) left + scatter_y(...) - c / V (x) sum_i s_i left_i)

The other classes i of a target of several classes are part of `others`, but their columns of x are 0 too, and
(K p_i - (1 - s) w_i) right_i is added to dleft: a difference of numbers that are nearly equal after training
is not formed from an x that was rounded to 16 bits.

so smoothing adds no pass over the vocabulary, and 1 is never subtracted from a probability that was rounded
to 16 bits. With a softcap, x is multiplied by the slope of each column, and the uniform part is a separate
product, (s / V) c slope @ right. The gradient of the head needs `total`, so the tiles of a chunk are kept if
the head is trained.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ual_kernels._matrices import add_by_label, add_selected, column_mean
from ual_kernels._operands import LinearInputs, LinearOutputs, LinearSpec, accumulator
from ual_kernels._tokens import (
    LossTokens,
    TargetClasses,
    TokenFns,
    TokenTerms,
    labels,
    mark_missed,
    other_classes,
    select_loss_tokens,
    token_statistics,
    token_terms,
)
from ual_kernels._torch.gemm import Gemm, even, onednn_precision
from ual_kernels._vocab_parallel import Shards
from ual_kernels.statistics import LOGITS_STATISTICS


class TileShape(NamedTuple):
    """Numbers of tokens in a chunk and of columns in a tile."""

    tokens: int
    width: int


def tile_shape(vocab: int, features: int, count: int, keep: bool, cuda: bool, chunk_tokens: int) -> TileShape:
    """Choose the shape of tiles by measured memory budgets (docs/kernels.md).

    On a CPU, tiles of logits and of the head have at most 8 MiB in float32. If tiles are kept, they have at
    most 64 MiB or a quarter of the head's float32 gradient, which each chunk reads and writes. On a GPU the
    budgets are 32 times larger.
    """
    larger = 32 if cuda else 1
    if keep:
        most = max(1, larger * (1 << 24) // vocab, features // 4)
    else:
        most = 4_096 if cuda else 1_024
    tokens = min(chunk_tokens or most, count)
    width = min(vocab, max(64, larger * (1 << 21) // tokens), max(64, larger * (1 << 21) // max(features, 1)))
    return TileShape(tokens, width if width == vocab else -(-width // 64) * 64)


def linear_cross_entropy(
    inputs: LinearInputs,
    spec: LinearSpec,
    token_fns: TokenFns | None = None,
    shards: Shards | None = None,
) -> LinearOutputs:
    """Implement `ops.linear_cross_entropy_op`. Ignored tokens are dropped before the first product."""
    outputs = LinearOutputs.empty(inputs, spec)
    outputs.fill_ignored()
    shards = shards or Shards(len(inputs.linear_weight))
    tokens = select_loss_tokens(inputs.target, spec.ignore_index, spec.max_loss_tokens)
    count = len(tokens.indices)
    if count == 0:
        outputs.dlinear_weight.zero_()
        return outputs

    gemm = Gemm(inputs.input, spec.precision)
    terms = _summands(inputs, spec, outputs, shards.vocab)
    sweep = Sweep(
        inputs, spec, terms, gemm, shards, count, statistics=spec.statistics or token_fns is not None
    )
    c_mean: Tensor | float = 1.0
    if inputs.class_weight is not None:
        c_mean = shards.sum(inputs.class_weight.sum()) / shards.vocab

    with onednn_precision("ieee"):  # except inside `gemm`, which sets its own precision
        for part in even(count, sweep.shape.tokens):
            chunk = Chunk.gather(inputs, spec, tokens, part, shards, gemm)
            sweep.run(chunk)
            sums = sweep.reduce(chunk, c_mean)
            a, weight = chunk.scale, None
            if token_fns is not None:
                assert sums.statistics is not None
                smoothing, weight = token_fns(sums.statistics[:LOGITS_STATISTICS])
                if smoothing is not None:
                    chunk = chunk._replace(smoothing=tokens.zero_ignored(smoothing, part))
                if weight is not None:
                    a = tokens.zero_ignored(a * weight, part)
            a = a + chunk.nan_mask
            target = sums.target
            algebra = token_terms(
                sums.nll, sums.lse, sums.smoothing_term, chunk.smoothing, target.weight, target.excess,
                c_mean, spec.z_loss,
            )  # fmt: skip
            state = torch.stack([algebra.loss + chunk.nan_mask, algebra.ds + chunk.nan_mask])
            if weight is not None:  # a weight from the statistics is part of the loss for a token_scale of 1
                state = state * weight
            outputs.loss[chunk.indices] = tokens.zero_ignored(a * algebra.loss, part)
            outputs.state[:, chunk.indices] = tokens.zero_ignored(state, part)
            if spec.probability_grad:
                mask = chunk.nan_mask
                dp = target.probability_gradient(sums.nll + mask, sums.lse + mask, chunk.smoothing)
                dp = dp if weight is None else dp * weight[:, None]
                outputs.dprobabilities[chunk.indices] = tokens.zero_ignored(dp.T, part).T
            if spec.gradient_filter:
                sweep.skip(tokens.zero_ignored(sums.rescale / sums.total, part))
            if spec.statistics:
                assert sums.statistics is not None
                sums.statistics[-1] = sweep.dropped
                outputs.statistics[:, chunk.indices] = torch.where(
                    chunk.counted, sums.statistics, outputs.statistics[:, chunk.indices]
                )
            if spec.gradients:
                factors = _factors(inputs, spec, chunk, sums, algebra, a, shards.vocab)
                dlefts = sweep.gradients(chunk, factors, first=part.start == 0, last=part.stop == count)
                _input_gradient(inputs, spec, outputs, chunk, dlefts, shards)
    mark_missed(
        tokens, inputs.target, spec.ignore_index, outputs.loss, outputs.state.T, outputs.dinput,
        outputs.dprobabilities,
    )  # fmt: skip
    return outputs


class Summand(NamedTuple):
    """One product left @ right^T of the logits and its gradients."""

    right: Tensor  # [V, k]
    mean: Tensor | None  # [k], mean of c_v right_v; None with a softcap
    dright: Tensor | None  # [V, k] ACC, if requested
    smoothed: Tensor  # [k] ACC, sum over tokens of s a left
    through: bool  # whether dleft is requested
    exact: bool  # whether factors are multiplied in ACC


def _summands(inputs: LinearInputs, spec: LinearSpec, outputs: LinearOutputs, vocab: int) -> list[Summand]:
    acc = accumulator(inputs.input)

    def summand(right: Tensor, dright: Tensor, through: bool, exact: bool) -> Summand:
        right = right.detach()
        mean = None if spec.softcap else column_mean(right, inputs.class_weight, vocab)
        smoothed = right.new_zeros(right.shape[1], dtype=acc)
        return Summand(
            right, mean, dright if dright.numel() else None, smoothed, through and spec.gradients, exact
        )

    found = [summand(inputs.linear_weight, outputs.dlinear_weight, spec.input_grad, exact=False)]
    if inputs.lora_b is not None:
        through = spec.input_grad or spec.lora_grad
        found.append(summand(inputs.lora_b.to(acc), outputs.dlora_b, through, exact=True))
    if inputs.linear_bias is not None:
        bias = inputs.linear_bias.to(acc)[:, None]
        found.append(summand(bias, outputs.dlinear_bias[:, None], False, exact=True))
    return found


class Chunk(NamedTuple):
    """A chunk of the loss tokens; inputs of ignored tokens among them are set to zero."""

    indices: Tensor  # [M], into the N tokens
    lefts: list[Tensor]  # the left factor of each summand
    label: Tensor  # [M], in [0, V) for every token
    column: Tensor  # [M, K], the columns of the target's classes in this shard; the label's is the first
    held: Tensor  # [M, K] bool, whether this shard has the class
    probability: Tensor  # [M, K]
    smoothing: Tensor  # [M]
    scale: Tensor  # [M]
    nan_mask: Tensor  # [M], NaN if the target is out of range, else 0
    counted: Tensor  # [M] bool, neither ignored nor out of range
    hidden: Tensor  # [M, D]

    @classmethod
    def gather(
        cls,
        inputs: LinearInputs,
        spec: LinearSpec,
        tokens: LossTokens,
        part: slice,
        shards: Shards,
        gemm: Gemm,
    ) -> "Chunk":
        """Gather the tokens of one part."""
        acc, index = accumulator(inputs.input), tokens.indices[part]
        hidden, label = inputs.input[index], labels(inputs.target[index], shards.vocab, spec.ignore_index)
        if tokens.selected is not None:
            hidden = hidden.masked_fill(~tokens.selected[part][:, None], 0.0)
        nan_mask = label.nan_mask.to(acc)
        if tokens.complete is not None:
            nan_mask = torch.where(tokens.complete, nan_mask, torch.nan)
        classes = label.column[:, None] if inputs.classes is None else inputs.classes[index]
        column, held = shards.place(classes)
        if inputs.probabilities is None:
            probability = hidden.new_ones(classes.shape, dtype=acc)
        else:
            probability = inputs.probabilities[index]
        lefts = [gemm.factor(hidden)]
        if inputs.lora_a is not None:
            lefts.append(torch.mm(hidden.to(acc), inputs.lora_a.detach().to(acc).T) * spec.lora_scale)
        if inputs.linear_bias is not None:
            lefts.append(hidden.new_ones((len(index), 1), dtype=acc))
        return cls(
            index,
            lefts,
            label.column,
            column,
            held,
            probability,
            tokens.zero_ignored(inputs.smoothing[index], part),
            tokens.zero_ignored(inputs.token_scale[index], part),
            nan_mask,
            label.selected & label.valid,
            hidden,
        )


class Sums(NamedTuple):
    """Sums over all tiles and shards, [M] each."""

    rescale: Tensor  # factor from this shard's reference point to the common reference point
    others: Tensor  # sum of x without the target
    total: Tensor  # sum of x with the target
    reference: Tensor  # the common reference point
    target: TargetClasses
    nll: Tensor
    lse: Tensor
    smoothing_term: Tensor
    statistics: Tensor | None  # [9, M]


class Factors(NamedTuple):
    """Factors in the gradients."""

    of_x: Tensor  # [M]
    of_target: Tensor  # [M, K], of the columns of the target's classes; 0 if another shard has the class
    of_mean: Tensor  # [M]


def _factors(
    inputs: LinearInputs,
    spec: LinearSpec,
    chunk: Chunk,
    sums: Sums,
    algebra: TokenTerms,
    a: Tensor,
    vocab: int,
) -> Factors:
    target, s = sums.target, chunk.smoothing
    of_label = algebra.uniform - algebra.k * (sums.others / sums.total)
    of_target = of_label[:, None]
    if target.z.shape[1] > 1:
        of_label = of_label + (1 - s) * target.weights[:, 1:].sum(1)
        p = torch.exp(target.z[:, 1:] - sums.reference[:, None]) / sums.total[:, None]
        of_others = algebra.k[:, None] * p - (1 - s)[:, None] * target.weights[:, 1:]
        of_target = torch.cat([of_label[:, None], of_others], 1)
    if spec.softcap:
        slope = 1 - (target.z / spec.softcap).square()
        of_target = (of_target - s[:, None] * target.class_weight / vocab) * slope
    counted = target.others
    counted[:, 0] = target.held[:, 0]
    a = a * spec.logit_scale
    return Factors(
        a * algebra.k / sums.total * sums.rescale,
        torch.where(counted, a[:, None] * of_target, 0.0),
        a * s,
    )


def _input_gradient(
    inputs: LinearInputs,
    spec: LinearSpec,
    outputs: LinearOutputs,
    chunk: Chunk,
    dlefts: list[Tensor | None],
    shards: Shards,
) -> None:
    """Compute the gradients of hidden states and A from those of the left factors."""
    acc, through_b = outputs.loss.dtype, None
    if inputs.lora_a is not None and (du := dlefts[1]) is not None:
        through_b = du * spec.lora_scale
        if spec.lora_grad:
            summed = shards.sum(through_b.clone())
            outputs.dlora_a.addmm_(summed.T, chunk.hidden.to(acc))
    if (de := dlefts[0]) is not None:
        if through_b is not None and inputs.lora_a is not None:
            de.addmm_(through_b, inputs.lora_a.detach().to(acc))
        outputs.dinput[chunk.indices] = shards.sum_input_grad(de).to(outputs.dinput.dtype)


class Tile(NamedTuple):
    part: slice
    x: Tensor  # [M, w]: exp(z - reference), times the slope with a softcap
    slope: Tensor | None  # [M, w]: class weight times slope
    reference: Tensor  # [M]
    mass: Tensor  # [M]: sum of exp(z - reference) without the target


class Sweep:
    """The pass of one chunk of tokens over all tiles; attributes hold the results of the last chunk."""

    def __init__(
        self,
        inputs: LinearInputs,
        spec: LinearSpec,
        summands: list[Summand],
        gemm: Gemm,
        shards: Shards,
        count: int,
        *,
        statistics: bool,
    ) -> None:
        self.summands, self.gemm, self.shards = summands, gemm, shards
        self.class_weight, self.spec, self.statistics = inputs.class_weight, spec, statistics
        size, features = inputs.linear_weight.shape
        self.keep = any(t.dright is not None for t in summands) or spec.gradient_filter > 0
        # ranks synchronize after every chunk, so the largest shard determines the chunks of all ranks
        self.shape = tile_shape(
            shards.largest, features, count, self.keep, inputs.input.is_cuda, spec.chunk_tokens
        )
        width = self.shape.width
        self.parts = [slice(v, min(v + width, size)) for v in range(0, size, width)]
        # one buffer for all chunks: on a CPU, new memory pages cost as much as the exponentials
        new = summands[0].smoothed.new_empty
        kept = size if self.keep else width
        self._tiles = new(self.shape.tokens * kept)
        self._slopes = new(self.shape.tokens * (kept if spec.softcap and spec.gradients else 0))
        self._widened = gemm.buffer(width, features)

    def run(self, chunk: Chunk) -> None:
        """Compute `largest`, `others`, `z`, `mean` with a softcap, and `x_rights` for gradients."""
        tokens = len(chunk.indices)
        zero = chunk.scale.new_zeros(tokens)
        lowest = torch.full_like(zero, -torch.inf)
        self.largest, self.others, self.mean = lowest, zero, zero
        self.second, self.moment, self.plain, self.dropped = lowest, zero, zero, zero
        self.z = torch.zeros_like(chunk.probability)  # of the target's classes
        self.top = torch.zeros_like(chunk.label)  # the column of the largest logit
        self.others_listed = other_classes(chunk.held, chunk.probability)
        self.x_rights = [
            zero.new_zeros(tokens, t.right.shape[1]) if t.through else None for t in self.summands
        ]
        self.slope_rights = [x if x is None or not self.spec.softcap else x.clone() for x in self.x_rights]
        self.kept: list[Tile] = []
        self.skipped: set[int] = set()
        for part in self.parts:
            self._one(chunk, part)

    def _one(self, chunk: Chunk, part: slice) -> None:
        tokens, wide = len(chunk.indices), part.stop - part.start
        at = tokens * part.start if self.keep else 0
        z = self._tiles[at : at + tokens * wide].view(tokens, wide)
        head = self.gemm.operand(self.summands[0].right[part], self._widened)
        slope = self._logits(chunk, part, head, z, at)

        where = (chunk.column - part.start).clamp(0, wide - 1)
        here = chunk.held & (chunk.column >= part.start) & (chunk.column < part.stop)
        self.z = torch.where(here, z.gather(1, where), self.z)
        largest = self._two_largest(z, part.start) if self.statistics else z.amax(1)
        before, self.largest = self.largest, torch.maximum(self.largest, largest)
        reference = finite(self.largest)
        rescale = torch.exp(before - reference)
        z.sub_(reference[:, None])
        shifted = z.clone() if self.statistics else None
        x = z.exp_()
        _zero_at(x, where[:, :1], here[:, :1])
        mass = x.sum(1)
        if shifted is not None:
            moved = torch.where(self.others > 0, (before - reference) * self.others, 0.0)
            self.moment = rescale * (self.moment + moved)
            self.moment += shifted.masked_fill_(x == 0, 0.0).mul_(x).sum(1)
        self.others = self.others * rescale + mass
        if where.shape[1] > 1 and self.spec.gradients:
            listed = here & self.others_listed
            _zero_at(x, where, listed)
            if self.spec.gradient_filter:  # the gradients of these columns are never spread
                mass = x.sum(1)
        tile = Tile(part, x, slope, reference, mass)
        if self.keep:
            self.kept.append(tile)
        if not self.spec.gradients:
            return
        if slope is not None:
            x.mul_(slope)
            _zero_at(slope, where[:, :1], here[:, :1])
            if where.shape[1] > 1:
                _zero_at(slope, where, here & self.others_listed)
            if self.class_weight is not None:
                slope.mul_(self.class_weight[part])
        if not self.spec.gradient_filter:
            for x_right in self.x_rights:
                if x_right is not None:
                    x_right.mul_(rescale[:, None])
            self._through(tile, head, tile.x)

    def _logits(self, chunk: Chunk, part: slice, head: Tensor, z: Tensor, at: int) -> Tensor | None:
        """Write a tile of final logits to z; return the slopes of a softcap if gradients need them."""
        self.gemm.logits(chunk.lefts[0], head, z)
        for left, summand in zip(chunk.lefts[1:], self.summands[1:], strict=True):
            z.addmm_(left, summand.right[part].T)
        if self.spec.logit_scale != 1.0:
            z.mul_(self.spec.logit_scale)
        softcap, slope = self.spec.softcap, None
        if softcap:
            z.div_(softcap).tanh_()
            if self.spec.gradients:
                slope = self._slopes[at : at + z.numel()].view(z.shape)
                torch.mul(z, z, out=slope).neg_().add_(1.0)
            z.mul_(softcap)
            of_classes = z.sum(1) if self.class_weight is None else z @ self.class_weight[part]
            self.mean = self.mean + of_classes
        return slope

    def _two_largest(self, z: Tensor, start: int) -> Tensor:
        """Return the tile's largest logits; update `top`, `second` and `plain`."""
        largest, place = z.max(1, keepdim=True)
        z.scatter_(1, place, -torch.inf)
        self.top = torch.where(largest.squeeze(1) > self.largest, start + place.squeeze(1), self.top)
        second = torch.maximum(self.second, z.amax(1))
        self.second = torch.maximum(second, torch.minimum(self.largest, largest.squeeze(1)))
        z.scatter_(1, place, largest)
        self.plain = self.plain + z.sum(1)
        return largest.squeeze(1)

    def reduce(self, chunk: Chunk, c_mean: Tensor | float) -> Sums:
        """Reduce over shards, after the last tile."""
        shards, spec = self.shards, self.spec
        largest = shards.maximum(self.largest.clone())
        reference = finite(largest)
        rescale = torch.exp(self.largest - reference)
        others = shards.sum(self.others * rescale)
        z = shards.sum(self.z)
        z_y = z[:, 0]
        if spec.softcap:
            mean = shards.sum(self.mean / shards.vocab)
        else:
            means = [
                left.to(z_y.dtype) @ t.mean
                for left, t in zip(chunk.lefts, self.summands, strict=True)
                if t.mean is not None
            ]
            mean = shards.sum(torch.stack(means).sum(0) * spec.logit_scale)
        c = torch.ones_like(z)
        if self.class_weight is not None:
            c = shards.sum(torch.where(chunk.held, self.class_weight[chunk.column], 0.0))
        target = TargetClasses(chunk.column, chunk.held, chunk.probability, c, z)

        # log(others / exp(z_y - reference)); others and the exponential may overflow or underflow
        log_odds = (reference - z_y) + others.log()
        nll = log_odds.clamp(min=0.0) + torch.log1p(torch.exp(-log_odds.abs()))
        total = others + torch.exp(z_y - reference)
        packed = None
        if self.statistics:
            packed = self._statistics(chunk, target, reference, total, nll, largest)
        return Sums(
            rescale, others, total, reference, target, nll, reference + total.log(), mean - c_mean * z_y,
            packed,
        )  # fmt: skip

    def _statistics(
        self,
        chunk: Chunk,
        target: TargetClasses,
        reference: Tensor,
        total: Tensor,
        nll: Tensor,
        largest: Tensor,
    ) -> Tensor:
        """Return TokenStatistics [9, M]; `skip` determines the last field later."""
        z_y = target.z_y
        rescale = torch.exp(self.largest - reference)
        shift = torch.where(self.others > 0, (self.largest - reference) * self.others, 0.0)
        moment = self.shards.sum(rescale * (self.moment + shift))
        t = torch.exp(z_y - reference)
        moment = moment + torch.where(t > 0, t * (z_y - reference), 0.0)
        top = self.shards.top(self.largest, self.second, self.top)
        mean = self.shards.sum(self.plain / self.shards.vocab)
        packed = token_statistics(
            z_y, reference, total, target.log_prob(nll), moment, largest, top.second, mean,
            chunk.label, top.label,
        )  # fmt: skip
        return torch.cat([packed, torch.zeros_like(packed[:1])])

    def _through(self, tile: Tile, head: Tensor, x: Tensor | None) -> None:
        """Add x @ right and slope @ right to the accumulators of each left factor's gradient."""
        for t, out, slope_right in zip(self.summands, self.x_rights, self.slope_rights, strict=True):
            if out is None or slope_right is None:
                continue
            add = Tensor.addmm_ if t.exact else self.gemm.add
            right = t.right[tile.part] if t.exact else head
            if x is not None:
                add(out, x, right)
            if tile.slope is not None:
                add(slope_right, tile.slope, right)

    def gradients(self, chunk: Chunk, factors: Factors, *, first: bool, last: bool) -> list[Tensor | None]:
        """Return dleft of each summand; add to dright, which the first chunk initializes."""
        for t, left in zip(self.summands, chunk.lefts, strict=True):
            if t.dright is not None and not self.spec.softcap:
                t.smoothed.add_(factors.of_mean @ left.to(t.dright.dtype))
        for number, tile in enumerate(self.kept):
            if first:
                for t in self.summands:
                    if t.dright is not None:
                        t.dright[tile.part].zero_()
            rescale = torch.exp(tile.reference - finite(self.largest))
            skipped = number in self.skipped
            if skipped:
                self._spread_evenly(tile, rescale, chunk, factors)
            if self.spec.gradient_filter and not (skipped and tile.slope is None):
                head = self.gemm.operand(self.summands[0].right[tile.part], self._widened)
                self._through(tile, head, None if skipped else tile.x * rescale[:, None])
            self._head_gradient(tile, rescale, chunk, factors, skipped=skipped, last=last)
        return [
            self._left_gradient(t, left, x_right, slope_right, chunk, factors)
            for t, left, x_right, slope_right in zip(
                self.summands, chunk.lefts, self.x_rights, self.slope_rights, strict=True
            )
        ]

    def _head_gradient(
        self, tile: Tile, rescale: Tensor, chunk: Chunk, factors: Factors, *, skipped: bool, last: bool
    ) -> None:
        """Add one tile's part of dright, without the targets' columns."""
        vocab = self.shards.vocab
        for t, left in zip(self.summands, chunk.lefts, strict=True):
            if t.dright is None:
                continue
            add = Tensor.addmm_ if t.exact else self.gemm.add_scaled
            out, wide = t.dright[tile.part], left.to(t.dright.dtype)
            if not skipped:
                add(out, tile.x.T, wide * (factors.of_x * rescale)[:, None])
            if tile.slope is not None:
                add(out, tile.slope.T, wide * (factors.of_mean / -vocab)[:, None])
            if last and not self.spec.softcap:
                over = out.new_ones(len(out)) if self.class_weight is None else self.class_weight[tile.part]
                out.addr_(over, t.smoothed, alpha=-1.0 / vocab)

    def _left_gradient(
        self,
        t: Summand,
        left: Tensor,
        x_right: Tensor | None,
        slope_right: Tensor | None,
        chunk: Chunk,
        factors: Factors,
    ) -> Tensor | None:
        if t.dright is not None:
            wide = left.to(t.dright.dtype)
            # padding would add to class 0 again and again, which is slow on a GPU
            columns = torch.where(factors.of_target == 0, chunk.column[:, :1], chunk.column)
            for column, factor in zip(columns.T, factors.of_target.T, strict=True):
                add_by_label(t.dright, column, wide * factor[:, None])
        if x_right is None:
            return None
        dleft = x_right.mul_(factors.of_x[:, None])
        add_selected(dleft, factors.of_target, t.right, chunk.column)
        if t.mean is not None:
            dleft.addcmul_(factors.of_mean[:, None], t.mean, value=-1)
        elif slope_right is not None:
            dleft.addcmul_(factors.of_mean[:, None], slope_right, value=-1.0 / self.shards.vocab)
        return dleft

    def _spread_evenly(self, tile: Tile, rescale: Tensor, chunk: Chunk, factors: Factors) -> None:
        """Add x @ right of a skipped tile, with its mass spread evenly over the tile."""
        mass = (tile.x.sum(1) * rescale)[:, None]
        for t, left, out in zip(self.summands, chunk.lefts, self.x_rights, strict=True):
            right = t.right[tile.part]
            if out is not None:
                out += mass * right.mean(0, dtype=out.dtype)
            if t.dright is not None:
                t.dright[tile.part] += ((factors.of_x[:, None] * mass).T @ left.to(mass.dtype)) / len(right)

    def skip(self, share: Tensor) -> None:
        """Skip tiles that together hold less than the threshold of every token's probability.

        A tile's mass times `share` [M] is its probability.
        """
        reference = finite(self.largest)
        masses = torch.stack([t.mass * torch.exp(t.reference - reference) * share for t in self.kept])
        order = masses.amax(1).argsort()
        together = masses[order].cumsum(0)
        count = int((together.amax(1) < self.spec.gradient_filter).sum())
        if count:
            self.dropped = together[count - 1]
        self.skipped = set(order[:count].tolist())


def finite(largest: Tensor) -> Tensor:
    """Return the largest logit as a reference point for sums, or 0 if all logits are -inf."""
    return torch.where(largest == -torch.inf, 0.0, largest)


def _zero_at(x: Tensor, column: Tensor, where: Tensor) -> None:
    """Set x [M, w] >= 0 to 0 at columns [M, K] where `where` [M, K] is True."""
    if column.shape[1] == 1:
        x.scatter_(1, column, torch.where(where, 0.0, x.gather(1, column)))
    else:  # the minimum, because another entry of the token may have the same column and not be True
        x.scatter_reduce_(1, column, torch.where(where, 0.0, torch.inf).to(x.dtype), reduce="amin")
