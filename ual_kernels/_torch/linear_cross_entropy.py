"""Cross entropy of hidden states and a head in plain PyTorch: any device, and the fast path of a CPU.

The logits of a row are z = scale (e C^T + u B^T + b), a sum of products left @ right^T: hidden state and
head, LoRA's e A^T and B, one and the bias. Chunks of rows walk over tiles of the vocabulary; of the logits no
more exists than one tile, small enough to stay in a CPU's cache, and each is finished while it is there:

    m      = max(m, max z)                 x = exp(z - m), 0 in the target's column
    others = others exp(m' - m) + sum x    X = X exp(m' - m) + x @ right        (m' the maximum before)

With y the target, s its smoothing, c class weights (or 1), cbar = mean_v c_v right_v, and after the last tile

    total = others + exp(z_y - m)      nll = log(1 + others / exp(z_y - m))      rest = others / total
    Q     = (1 - s) c_y + s mean(c)    K = Q + 2 z_loss lse
    loss  = Q nll - s (mean(c z) - mean(c) z_y) + z_loss lse^2        mean(c z) = scale sum of left . cbar
    dleft = scale ((K / total) X + (s mean(c) + 2 z_loss lse - K rest) right_y - s cbar)
    dright = scale (x^T diag(K / total) left + scatter_y(...) - c / V (x) sum_i s_i left_i)

so the V-wide work is that of the plain softmax, whatever s is, and what is rounded to 16 bits inside a
product is never the probability that 1 is subtracted from. A softcap gives each column a slope: x is
multiplied by it, and the uniform part becomes a product of its own, (s / V) c slope @ right. What the head's
gradient needs, it needs after `total` is known: a trained head keeps the tiles of its chunk.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ual_kernels._rows import (
    COUNT,
    STATISTICS,
    Rule,
    add_rows,
    column_mean,
    dead_statistics,
    kept_rows,
    labels,
    poison_missed,
    stored_dtype,
)
from ual_kernels.parallel import Whole


class Plan(NamedTuple):
    """How much is worked on at a time."""

    rows: int
    width: int


def plan(vocab: int, features: int, count: int, keep: bool, cuda: bool, chunk_tokens: int) -> Plan:
    """Rows of a chunk and columns of a tile, by budgets that were measured to serve (docs/kernels.md).

    A CPU wants tiles of 8 MiB of float32, and the 16-bit head's tile, widened, no larger; a trained head
    keeps 64 MiB of tiles, or a quarter of what its float32 gradient takes, which each chunk reads and writes.
    A GPU wants them 32 times larger, for its GEMMs.
    """
    larger = 32 if cuda else 1
    if keep:
        most = max(1, larger * (1 << 24) // vocab, features // 4)
    else:
        most = 4_096 if cuda else 1_024
    rows = min(chunk_tokens or most, count)
    width = min(vocab, max(64, larger * (1 << 21) // rows), max(64, larger * (1 << 21) // max(features, 1)))
    return Plan(rows, width if width == vocab else -(-width // 64) * 64)


class Term(NamedTuple):
    """One summand left @ right^T of the logits, and where its gradients go."""

    right: Tensor  # [V, k]
    mean: Tensor | None  # [k], of c_v right_v; None under a softcap
    dright: Tensor | None  # [V, k] ACC, if wanted
    spread: Tensor  # [k] ACC, sum over rows of s a left
    through: bool  # whether dleft is wanted
    exact: bool  # factors that are not what came in bfloat16


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    target: Tensor,
    smoothing: Tensor,
    row_scale: Tensor,
    class_weight: Tensor | None,
    *,
    ignore_index: int,
    softcap: float,
    logit_scale: float,
    lora_scale: float,
    z_loss: float,
    gradient_filter: float,
    statistics: bool,
    input_grad: bool,
    head_grad: bool,
    lora_grad: bool,
    per_row: bool,
    live_rows: int = COUNT,
    chunk_tokens: int = 0,
    precision: str = "high",
    rule: Rule | None = None,
    whole: Whole | None = None,
) -> tuple[Tensor, ...]:
    """The body of `ops.linear_cross_entropy`. Ignored rows leave before the first product.

    `rule` and `whole` (the shards of a process group) are what no operator's schema can hold.
    """
    rows, features = input.shape
    size = linear_weight.shape[0]
    acc = torch.promote_types(input.dtype, torch.float32)
    capped = bool(softcap)
    whole = whole or Whole(size)
    vocab = whole.vocab

    def wide(*shape: int, when: bool = True) -> Tensor:
        return input.new_zeros(shape if when else (0, *shape[1:]), dtype=acc)

    loss, state = wide(rows), wide(2, rows)
    stats = dead_statistics(input, STATISTICS, rows if statistics else 0, acc)
    dinput = wide(rows, features, when=input_grad).to(stored_dtype(input.dtype, per_row))
    # each tile is zeroed when it is about to be added to: fresh pages cost a CPU as much as a product
    dhead = input.new_empty((size if head_grad else 0, features), dtype=acc)
    dbias = wide(size, when=head_grad and linear_bias is not None)
    rank = 0 if lora_a is None else lora_a.shape[0]
    dlora_a, dlora_b = wide(rank, features, when=lora_grad), wide(size, rank, when=lora_grad)
    outputs = (loss, state, stats, dinput, dhead, dbias, dlora_a, dlora_b)

    kept = kept_rows(target, ignore_index, live_rows)
    count = len(kept.index)
    if count == 0:
        dhead.zero_()
        return outputs

    products = Products(input, precision)
    write = input_grad or head_grad or lora_grad

    def term(right: Tensor, dright: Tensor, through: bool, exact: bool) -> Term:
        right = right.detach()
        mean = None if capped else column_mean(right, class_weight, vocab)
        return Term(
            right, mean, dright if dright.numel() else None, wide(right.shape[1]), through and write, exact
        )

    terms = [term(linear_weight, dhead, input_grad, exact=False)]
    if lora_b is not None:
        terms.append(term(lora_b.to(acc), dlora_b, input_grad or lora_grad, exact=True))
    if linear_bias is not None:
        terms.append(term(linear_bias.to(acc)[:, None], dbias[:, None], False, exact=True))
    keep = any(t.dright is not None for t in terms) or gradient_filter > 0
    # the ranks of a group meet after every chunk: theirs are those of the largest shard
    shape = plan(whole.largest, features, count, keep, input.is_cuda, chunk_tokens)
    sweep = Sweep(
        products, terms, class_weight, softcap, logit_scale, shape, vocab,
        statistics=statistics or rule is not None, write=write, keep=keep, filter=gradient_filter,
    )  # fmt: skip
    c_mean: Tensor | float = 1.0
    if class_weight is not None:
        c_mean = whole.sum(class_weight.sum()) / vocab

    with onednn_precision("ieee"):  # but where `products` knows better
        for chunk in even(count, shape.rows):
            index = kept.index[chunk]
            live = None if kept.live is None else kept.live[chunk]
            e, labelled = input[index], target[index]
            s, a = smoothing[index], row_scale[index]
            y, alive, legal = labels(labelled, vocab, ignore_index)
            if live is not None:  # dead rows are among these; what they hold must not matter
                e, s, a = e.masked_fill(~live[:, None], 0.0), s.where(live, 0.0), a.where(live, 0.0)
            poison = torch.where(legal | ~alive, 0.0, torch.nan).to(acc)
            mine = (y >= whole.start) & (y < whole.start + size)
            column = torch.where(mine, y - whole.start, 0)
            lefts = [products.factor(e)]
            if lora_a is not None:
                lefts.append(torch.mm(e.to(acc), lora_a.detach().to(acc).T) * lora_scale)
            if linear_bias is not None:
                lefts.append(input.new_ones((len(index), 1), dtype=acc))

            sweep.run(lefts, column, mine)
            # what only the owner of the target's class, or each rank in part, can know
            high = whole.maximum(sweep.high.clone())
            base = torch.where(high == -torch.inf, 0.0, high)
            fade = torch.exp(sweep.high - base)
            others = whole.sum(sweep.others * fade)
            z_y = whole.sum(sweep.z_y)
            if capped:
                mean = whole.sum(sweep.mean / vocab)
            else:
                means = [
                    left.to(acc) @ t.mean for left, t in zip(lefts, terms, strict=True) if t.mean is not None
                ]
                mean = whole.sum(torch.stack(means).sum(0) * logit_scale)
            c_y: Tensor | float = 1.0
            if class_weight is not None:
                c_y = whole.sum(torch.where(mine, class_weight[column], 0.0))

            odds = (base - z_y) + others.log()
            nll = odds.clamp(min=0.0) + torch.log1p(torch.exp(-odds.abs()))
            total = others + torch.exp(z_y - base)
            lse, rest = base + total.log(), others / total
            weight = None
            if sweep.statistics:
                facts = _facts(sweep, whole, high, base, z_y, nll, total, lse, vocab)
                if rule is not None:
                    chosen, weight = rule(facts[:7])
                    s = s if chosen is None else chosen
                    a = a if weight is None else a * weight
                    if live is not None:
                        s, a = s.where(live, 0.0), a.where(live, 0.0)
            if kept.enough is not None:
                poison = torch.where(kept.enough, poison, torch.nan)
            a = a + poison

            gap = mean - c_mean * z_y
            q = (1 - s) * c_y + s * c_mean
            # a row that does not smooth must not see the mean of a vocabulary with -inf in it (0 inf = nan)
            unit = q * nll - torch.where(s == 0, 0.0, s * gap)
            at_target = s * c_mean
            k = q
            if z_loss:
                unit = unit + z_loss * lse.square()
                k, at_target = k + 2 * z_loss * lse, at_target + 2 * z_loss * lse
            at_target = at_target - k * rest
            ds = (c_mean - c_y) * nll - gap
            facts_of_loss = torch.stack([unit + poison, ds + poison])
            if weight is not None:  # what the rule chose belongs to the unit loss
                facts_of_loss = facts_of_loss * weight
            if live is not None:
                facts_of_loss = torch.where(live, facts_of_loss, 0.0)
            scaled = a * unit
            loss[index] = scaled if live is None else torch.where(live, scaled, 0.0)
            state[:, index] = facts_of_loss
            if gradient_filter:
                share = fade / total
                sweep.skip(share if live is None else share.where(live, 0.0))
            if statistics:
                facts[7] = sweep.dropped
                stats[:, index] = torch.where(legal & alive, facts, stats[:, index])
            if not write:
                continue

            slope_y = 1 - (z_y / softcap).square() if capped else 1.0
            if capped:
                at_target = (at_target - s * c_y / vocab) * slope_y
            a = a * logit_scale
            rows_of = Rows(lefts, column, a * k / total * fade, torch.where(mine, a * at_target, 0.0), a * s)
            dlefts = sweep.gradients(rows_of, first=chunk.start == 0, last=chunk.stop == count)
            through_b = None
            if lora_a is not None and (of_u := dlefts[1]) is not None:
                through_b = whole.sum(of_u * lora_scale)
                if lora_grad:
                    dlora_a.addmm_(through_b.T, e.to(acc))
            if (de := dlefts[0]) is not None:
                de = whole.sum(de)
                if through_b is not None and lora_a is not None:
                    de.addmm_(through_b, lora_a.detach().to(acc))
                dinput[index] = de.to(dinput.dtype)
    poison_missed(kept, target, ignore_index, loss, state, dinput)
    return outputs


def _facts(
    sweep: "Sweep", whole: Whole, high: Tensor, base: Tensor, z_y: Tensor, nll: Tensor, total: Tensor,
    lse: Tensor, vocab: int,
) -> Tensor:  # fmt: skip
    """TokenStatistics of a chunk, [8, M]."""
    fade = torch.exp(sweep.high - base)
    shift = torch.where(sweep.others > 0, (sweep.high - base) * sweep.others, 0.0)
    moment = whole.sum(fade * (sweep.moment + shift))
    t = torch.exp(z_y - base)
    moment = moment + torch.where(t > 0, t * (z_y - base), 0.0)
    second = whole.second_largest(sweep.high, sweep.second)
    return torch.stack(
        [
            lse,
            -nll,
            total.log() - moment / total,
            torch.exp(high - base) / total,
            high - second,
            whole.sum(sweep.plain / vocab),
            (z_y >= high).to(lse.dtype),
            torch.zeros_like(lse),
        ]
    )


class Rows(NamedTuple):
    """Per-row factors of the gradient, and what they multiply."""

    lefts: list[Tensor]
    column: Tensor  # [M], the target's column among these rows of the head
    of_x: Tensor  # [M]
    of_target: Tensor  # [M], 0 where another rank holds the target
    of_mean: Tensor  # [M]


class Tile(NamedTuple):
    part: slice
    x: Tensor  # [M, w]: exp(z - anchor), times the slope if capped
    slope: Tensor | None  # [M, w]: class weight times slope
    anchor: Tensor  # [M]
    mass: Tensor  # [M]: sum of exp(z - anchor) but the target's


class Sweep:
    """One chunk of rows over all tiles; its results stay in attributes until the next."""

    def __init__(
        self,
        products: "Products",
        terms: list[Term],
        class_weight: Tensor | None,
        softcap: float,
        logit_scale: float,
        shape: Plan,
        vocab: int,
        *,
        statistics: bool,
        write: bool,
        keep: bool,
        filter: float,
    ) -> None:
        self.products, self.terms, self.class_weight = products, terms, class_weight
        self.softcap, self.logit_scale, self.vocab = softcap, logit_scale, vocab
        self.statistics, self.write, self.keep, self.filter = statistics, write, keep, filter
        size = len(terms[0].right)
        self.parts = [slice(v, min(v + shape.width, size)) for v in range(0, size, shape.width)]
        # one buffer for all chunks: fresh pages cost a CPU as much as an exponential
        new = terms[0].spread.new_empty
        kept = size if keep else shape.width
        self._tiles = new(shape.rows * kept)
        self._slopes = new(shape.rows * (kept if softcap and write else 0))
        self._widened = products.room(shape.width, terms[0].right.shape[1])

    def run(self, lefts: list[Tensor], column: Tensor, mine: Tensor) -> None:
        """All tiles: `high`, `others`, `z_y`; `mean` if capped; `x_rights` where a gradient is wanted."""
        rows = len(column)
        acc = self._tiles.dtype
        zero = lefts[0].new_zeros(rows, dtype=acc)
        lowest = torch.full_like(zero, -torch.inf)
        self.high, self.others, self.z_y, self.mean = lowest, zero, zero, zero
        self.second, self.moment, self.plain, self.dropped = lowest, zero, zero, zero
        self.x_rights = [zero.new_zeros(rows, t.right.shape[1]) if t.through else None for t in self.terms]
        self.bent_rights = [x if x is None or not self.softcap else x.clone() for x in self.x_rights]
        self.kept: list[Tile] = []
        self.skipped: set[int] = set()
        for part in self.parts:
            self._one(lefts, column, mine, part)

    def _one(self, lefts: list[Tensor], column: Tensor, mine: Tensor, part: slice) -> None:
        rows, wide = len(column), part.stop - part.start
        at = rows * part.start if self.keep else 0
        z = self._tiles[at : at + rows * wide].view(rows, wide)
        head = self.products.operand(self.terms[0].right[part], self._widened)
        self.products.logits(lefts[0], head, z)
        for left, term in zip(lefts[1:], self.terms[1:], strict=True):
            z.addmm_(left, term.right[part].T)
        if self.logit_scale != 1.0:
            z.mul_(self.logit_scale)
        slope = None
        class_weight = None if self.class_weight is None else self.class_weight[part]
        if self.softcap:
            z.div_(self.softcap).tanh_()
            if self.write:
                slope = self._slopes[at : at + rows * wide].view(rows, wide)
                torch.mul(z, z, out=slope).neg_().add_(1.0)
            z.mul_(self.softcap)
            self.mean = self.mean + (z.sum(1) if class_weight is None else z @ class_weight)

        where = (column - part.start).clamp(0, wide - 1)[:, None]
        here = (mine & (column >= part.start) & (column < part.stop))[:, None]
        at_target = z.gather(1, where)
        self.z_y = torch.where(here, at_target, self.z_y[:, None]).squeeze(1)
        if self.statistics:
            largest, place = z.max(1, keepdim=True)
            high = largest.squeeze(1)
            z.scatter_(1, place, -torch.inf)
            second = torch.maximum(self.second, z.amax(1))
            self.second = torch.maximum(second, torch.minimum(self.high, high))
            z.scatter_(1, place, largest)
            self.plain = self.plain + z.sum(1)
        else:
            high = z.amax(1)
        before, self.high = self.high, torch.maximum(self.high, high)
        anchor = torch.where(self.high == -torch.inf, 0.0, self.high)
        fade = torch.exp(before - anchor)
        z.sub_(anchor[:, None])
        shifted = z.clone() if self.statistics else None
        x = z.exp_()
        x.scatter_(1, where, torch.where(here, 0.0, x.gather(1, where)))
        mass = x.sum(1)
        if shifted is not None:
            falls = torch.where(self.others > 0, (before - anchor) * self.others, 0.0)
            self.moment = fade * (self.moment + falls)
            self.moment += shifted.masked_fill_(x == 0, 0.0).mul_(x).sum(1)
        self.others = self.others * fade + mass
        tile = Tile(part, x, slope, anchor, mass)
        if self.keep:
            self.kept.append(tile)
        if not self.write:
            return
        if slope is not None:
            x.mul_(slope)
            if class_weight is not None:
                slope.mul_(class_weight)
            slope.scatter_(1, where, torch.where(here, 0.0, slope.gather(1, where)))
        if not self.filter:
            for x_right in self.x_rights:
                if x_right is not None:
                    x_right.mul_(fade[:, None])
            self._through(tile, head, tile.x)

    def _through(self, tile: Tile, head: Tensor, x: Tensor | None) -> None:
        """Add x @ right, and the uniform part, to what becomes the gradient of each left."""
        for t, out, bent in zip(self.terms, self.x_rights, self.bent_rights, strict=True):
            if out is None or bent is None:
                continue
            add = Tensor.addmm_ if t.exact else self.products.add
            right = t.right[tile.part] if t.exact else head
            if x is not None:
                add(out, x, right)
            if tile.slope is not None:
                add(bent, tile.slope, right)

    def gradients(self, rows: Rows, *, first: bool, last: bool) -> list[Tensor | None]:
        """dleft of each term; dright is added to: the first chunk starts it, the last completes it."""
        for t, left in zip(self.terms, rows.lefts, strict=True):
            if t.dright is not None and not self.softcap:
                t.spread.add_(rows.of_mean @ left.to(t.dright.dtype))
        for number, tile in enumerate(self.kept):
            if first:
                for t in self.terms:
                    if t.dright is not None:
                        t.dright[tile.part].zero_()
            fade = torch.exp(tile.anchor - torch.where(self.high == -torch.inf, 0.0, self.high))
            skipped = number in self.skipped
            if skipped:
                self._leave(tile, fade, rows)
            if self.filter and not (skipped and tile.slope is None):
                head = self.products.operand(self.terms[0].right[tile.part], self._widened)
                self._through(tile, head, None if skipped else tile.x * fade[:, None])
            for t, left in zip(self.terms, rows.lefts, strict=True):
                if t.dright is None:
                    continue
                add = Tensor.addmm_ if t.exact else self.products.add_scaled
                out, wide = t.dright[tile.part], left.to(t.dright.dtype)
                if not skipped:
                    add(out, tile.x.T, wide * (rows.of_x * fade)[:, None])
                if tile.slope is not None:
                    add(out, tile.slope.T, wide * (rows.of_mean / -self.vocab)[:, None])
                if last and not self.softcap:
                    over = (
                        out.new_ones(len(out)) if self.class_weight is None else self.class_weight[tile.part]
                    )
                    out.addr_(over, t.spread, alpha=-1.0 / self.vocab)
        dlefts: list[Tensor | None] = []
        for t, left, x_right, bent in zip(
            self.terms, rows.lefts, self.x_rights, self.bent_rights, strict=True
        ):
            if t.dright is not None:
                wide = left.to(t.dright.dtype)
                add_rows(t.dright, rows.column, wide * rows.of_target[:, None])
            if x_right is None:
                dlefts.append(None)
                continue
            dleft = x_right.mul_(rows.of_x[:, None])
            dleft.addcmul_(rows.of_target[:, None], t.right[rows.column].to(dleft.dtype))
            if t.mean is not None:
                dleft.addcmul_(rows.of_mean[:, None], t.mean, value=-1)
            elif bent is not None:
                dleft.addcmul_(rows.of_mean[:, None], bent, value=-1.0 / self.vocab)
            dlefts.append(dleft)
        return dlefts

    def _leave(self, tile: Tile, fade: Tensor, rows: Rows) -> None:
        """What x @ right of a skipped tile would move: its mass, spread evenly over the tile."""
        mass = (tile.x.sum(1) * fade)[:, None]
        for t, left, out in zip(self.terms, rows.lefts, self.x_rights, strict=True):
            right = t.right[tile.part]
            if out is not None:
                out += mass * right.mean(0, dtype=out.dtype)
            if t.dright is not None:
                t.dright[tile.part] += ((rows.of_x[:, None] * mass).T @ left.to(mass.dtype)) / len(right)

    def skip(self, share: Tensor) -> None:
        """Leave out tiles that together hold less than the threshold of every row's probability.

        `share` makes of a tile's mass a probability.
        """
        anchor = torch.where(self.high == -torch.inf, 0.0, self.high)
        masses = torch.stack([t.mass * torch.exp(t.anchor - anchor) * share for t in self.kept])
        order = masses.amax(1).argsort()
        together = masses[order].cumsum(0)
        count = int((together.amax(1) < self.filter).sum())
        if count:
            self.dropped = together[count - 1]
        self.skipped = set(order[:count].tolist())


class Products:
    """The GEMMs of one call: factors as the device wants them, results in the accumulator's dtype.

    A CPU multiplies bfloat16 into bfloat16 only, but oneDNN multiplies *float32* matrices as bfloat16
    products with float32 sums when allowed: exact for numbers that came from bfloat16, four times faster than
    float32. CUDA multiplies 16-bit factors into float32. Under precision="fast" results, logits among them,
    are rounded to 16 bits on both.
    """

    def __init__(self, input: Tensor, precision: str) -> None:
        self._dtype = input.dtype
        self._acc = torch.promote_types(input.dtype, torch.float32)
        self._sixteen = input.dtype in (torch.bfloat16, torch.float16)
        self._fast = precision == "fast" and self._sixteen
        self._cuda = input.is_cuda
        self._widens = self._sixteen and not (self._fast or self._cuda)
        self._new = input.new_empty

    def room(self, width: int, features: int) -> Tensor:
        return self._new(width if self._widens else 0, features, dtype=self._acc)

    def factor(self, left: Tensor) -> Tensor:
        return left.to(self._acc) if self._widens else left

    def operand(self, tile: Tensor, room: Tensor) -> Tensor:
        return room[: len(tile)].copy_(tile) if self._widens else tile

    def logits(self, left: Tensor, right: Tensor, out: Tensor) -> None:
        """out = left @ right^T."""
        if self._fast:
            out.copy_(torch.mm(left, right.T))
        elif self._cuda and self._sixteen:
            out.copy_(torch.mm(left, right.T, out_dtype=self._acc))
        else:
            with self._allowed():
                torch.mm(left, right.T, out=out)

    def add(self, out: Tensor, a: Tensor, b: Tensor) -> None:
        """out += a @ b."""
        if self._fast:
            out += torch.mm(a.to(self._dtype), b.to(self._dtype))
        elif self._cuda and self._sixteen:
            out += torch.mm(a.to(self._dtype), b.to(self._dtype), out_dtype=self._acc)
        else:
            with self._allowed():
                out.addmm_(a, b.to(self._acc))

    def add_scaled(self, out: Tensor, a: Tensor, b: Tensor) -> None:
        """out += a @ b, where |a| <= 1 and b holds a loss's divisor, which float16 may have no room for."""
        if self._dtype != torch.float16 or self._widens:
            return self.add(out, a, b)
        most = b.abs().amax() * (len(b) * 2.0**-14)  # no sum of len(b) products overflows
        most = torch.where(most == 0, 1.0, most)
        product = torch.zeros_like(out)
        self.add(product, a, b / most)
        out.addcmul_(product, most)
        return None

    def _allowed(self) -> Any:
        exact = self._widens and self._dtype == torch.bfloat16
        return onednn_precision("bf16") if exact else nullcontext()


@contextmanager
def onednn_precision(name: str) -> Iterator[None]:
    settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = settings.fp32_precision
    settings.fp32_precision = name
    try:
        yield
    finally:
        settings.fp32_precision = before


def even(rows: int, most: int) -> Iterator[slice]:
    """Slices of at most `most` rows, as even as can be."""
    pieces = -(-rows // most)
    for i in range(pieces):
        yield slice(rows * i // pieces, rows * (i + 1) // pieces)
