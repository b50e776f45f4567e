"""Break the code on purpose, one line at a time, and see that the tests notice.

    python tests/mutants.py            every mutant
    python tests/mutants.py _torch     those of files whose path contains a word
    python tests/mutants.py --parts 3  a third of them, another one for another commit

The unbroken code must pass first. Each mutant is tried in a copy of the tree, with the tests named beside it:
they must fail (or the interpreter crash: an address out of bounds does that), not merely refuse to run.
"""

import argparse
import importlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from multiprocessing import connection, get_context
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
WORKERS = 2

LOGITS = "tests/kernels/test_cross_entropy.py"
LINEAR = "tests/kernels/test_linear_cross_entropy.py"
TILES = "tests/kernels/test_linear_options.py"
SHARDS = "tests/kernels/test_parallel.py"
LOSSES = "tests/kernels/test_losses.py"
BENCHMARKS = "tests/test_benchmarks.py"
PACK = "tests/ual/test_pack.py"


class Mutant(NamedTuple):
    file: str
    good: str
    bad: str
    tests: tuple[str, ...]


def mutants(file: str, tests: str, *changes: tuple[str, ...]) -> list[Mutant]:
    """Changes are (good, bad, names of tests in the file `tests`, ...)."""
    return [
        Mutant(file, good, bad, tuple(f"{tests}::{name}" for name in names)) for good, bad, *names in changes
    ]


MUTANTS = [
    *mutants(
        "ual_kernels/_triton/cross_entropy.py",
        LOGITS,
        (
            "rescale = tl.exp(high - base)",
            "rescale = tl.exp(base - base)",
            "test_the_maximum_may_come_late_or_early",
        ),
        (
            'base = tl.where(new_high == float("-inf"), 0.0, new_high)',
            "base = new_high",
            "test_forbidden_classes_cost_nothing_without_smoothing",
        ),
        (
            "            gap += tl.sum(tl.where(inside, z - z_y, 0.0)",
            "            gap += tl.sum(z - z_y",
            "test_every_width",
        ),
        (
            "loss = k * nll - tl.where(s == 0.0, 0.0, s * gap)",
            "loss = k * nll - s * gap",
            "test_forbidden_classes_cost_nothing_without_smoothing",
        ),
        ("k += 2.0 * Z_LOSS * lse", "k += Z_LOSS * lse", "test_every_flag"),
        (
            "    loss += poison\n    k += poison",
            "    loss += poison",
            "test_out_of_range_poisons_its_own_row_only",
        ),
        ("(c_mean - c_y) * nll - gap + poison", "poison - gap", "test_every_flag"),
        (
            "legal = (target >= 0) & (target < V)\n    s = ",
            "legal = (target >= 0) & (target <= V)\n    s = ",
            "test_out_of_range_poisons_its_own_row_only",
        ),
        (
            "tl.store(loss_ptr + row, tl.where(live, loss, 0.0))",
            "tl.store(loss_ptr + row, loss)",
            "test_what_an_ignored_row_holds_does_not_matter",
        ),
        (
            "row * stride_n\n    x_y",
            "(row * stride_n).to(tl.int32)\n    x_y",
            "test_offsets_past_two_to_the_31",
        ),
        (
            "logits_ptr + row * stride_n,\n",
            "logits_ptr + (row * stride_n).to(tl.int32),\n",
            "test_offsets_past_two_to_the_31",
        ),
        (
            "tl.maximum(tl.minimum(high, block_high), tl.maximum(second, block_second))",
            "tl.maximum(second, block_second)",
            "test_statistics",
        ),
        (
            "block_second = tl.where(tl.sum(largest.to(tl.int32), axis=0) > 1, block_high, block_second)",
            "pass",
            "test_statistics_of_a_tie",
        ),
        (
            "weighted_sum = rescale * (weighted_sum + moved)",
            "weighted_sum = rescale * weighted_sum",
            "test_statistics",
        ),
        (
            "tl.load(row_scale_ptr + row) * LOGIT_SCALE, live",
            "tl.load(row_scale_ptr + row), live",
            "test_the_gradient_in_place",
        ),
        (
            "dlogits_ptr + row * V",
            "dlogits_ptr + row * stride_n",
            "test_a_row_stride_reads_and_writes_only_its_view",
        ),
        (
            "dloss_ptr + row * stride_g",
            "dloss_ptr + row",
            "test_the_operator_takes_any_upstream",
        ),
        ("on_target = (1.0 - s) * c_y", "on_target = c_y", "test_every_flag"),
        ("spread = s / V", "spread = s", "test_every_flag"),
        ("p = tl.exp(z - high - log_sum)", "p = tl.exp(z - (high + log_sum))", "test_logits_far_from_zero"),
        ("dx *= 1.0 - (z / SOFTCAP) * (z / SOFTCAP)", "dx *= 1.0 - z / SOFTCAP", "test_every_flag"),
        (
            "tl.store(out_ptr + column, tl.where(live, dx, 0.0), mask=inside)",
            "tl.store(out_ptr + column, dx, mask=inside)",
            "test_what_an_ignored_row_holds_does_not_matter",
        ),
        (
            "stop = tl.where(scale == 1.0, 0, V)",
            "stop = tl.where(scale == 1.0, 0, 0)",
            "test_the_gradient_in_place",
        ),
    ),
    *mutants(
        "ual_kernels/_triton/math.py",
        LOGITS,
        ("z = SOFTCAP * tanh(z / SOFTCAP)", "z = SOFTCAP * tanh(x / SOFTCAP)", "test_every_flag"),
    ),
    *mutants(
        "ual_kernels/_torch/linear_cross_entropy.py",
        TILES,
        (
            "fade = torch.exp(before - anchor)",
            "fade = torch.ones_like(before)",
            "test_the_maximum_may_come_late_or_early",
        ),
        ("x_right.mul_(fade[:, None])", "pass", "test_every_flag_over_many_tiles"),
        (
            "anchor = torch.where(self.high == -torch.inf, 0.0, self.high)\n        fade",
            "anchor = self.high\n        fade",
            "test_whole_tiles_of_forbidden_classes",
        ),
        ("(column < part.stop)", "(column <= part.stop)", "test_every_flag_over_many_tiles"),
        ("rows.of_x * fade)[:, None])", "rows.of_x)[:, None])", "test_every_flag_over_many_tiles"),
        (
            "self.second = torch.maximum(second, torch.minimum(self.high, high))",
            "self.second = second",
            "test_statistics_over_many_tiles",
        ),
        (
            "self.moment = fade * (self.moment + falls)",
            "self.moment = fade * self.moment",
            "test_statistics_over_many_tiles",
        ),
        (
            "torch.where(kept.enough, poison, torch.nan)",
            "poison",
            "test_a_count_that_is_too_small_is_never_a_wrong_number",
        ),
        ("e.masked_fill(~live[:, None], 0.0)", "e", "test_what_a_dead_row_that_stays_holds_does_not_matter"),
        ("dlora_a.addmm_(through_b.T, e.to(acc))", "pass", "test_an_adapter_is_as_if_merged"),
        (
            "through_b = whole.sum(of_u * lora_scale)",
            "through_b = whole.sum(of_u)",
            "test_an_adapter_is_as_if_merged",
        ),
        (
            'self._fast = precision == "fast" and self._sixteen',
            "self._fast = False",
            "test_fast_is_off_by_the_rounding_of_logits_and_no_more",
        ),
        (
            "together.amax(1) < self.filter",
            "together.amin(1) < self.filter",
            "test_a_filter_is_off_by_the_mass_that_it_drops",
        ),
        ("s = s if chosen is None else chosen", "pass", "test_a_rule_is_the_tensor_that_it_makes"),
        ("a = a if weight is None else a * weight", "pass", "test_a_rule_is_the_tensor_that_it_makes"),
    ),
    *mutants(
        "ual_kernels/_torch/linear_cross_entropy.py",
        LINEAR,
        (
            "                torch.mm(left, right.T, out=out)",
            "                torch.mm(left, right.T, out=out)\n                out.copy_(out.bfloat16())",
            "test_sixteen_bits_are_rounded_once",
        ),
        ("torch.stack(means).sum(0) * logit_scale", "torch.stack(means).sum(0)", "test_every_flag"),
        ("x.scatter_(1, where, torch.where(here, 0.0, x.gather(1, where)))", "pass", "test_every_flag"),
        ("            x.mul_(slope)\n", "            pass\n", "test_every_flag"),
        (
            "at_target = (at_target - s * c_y / vocab) * slope_y",
            "at_target = at_target * slope_y",
            "test_every_flag",
        ),
        ("dleft.addcmul_(rows.of_mean[:, None], t.mean, value=-1)", "pass", "test_every_flag"),
        ("out.addr_(over, t.spread, alpha=-1.0 / self.vocab)", "pass", "test_every_flag"),
        ("            if first:\n", "            if last:\n", "test_any_chunk"),
        ("last=chunk.stop == count", "last=True", "test_any_chunk"),
        ("        dhead.zero_()\n", "", "test_all_rows_ignored_is_zero_with_a_connected_graph"),
        ("            a = a * logit_scale\n", "            pass\n", "test_every_flag"),
        (
            "yield slice(rows * i // pieces, rows * (i + 1) // pieces)",
            "yield slice(i * most, min(rows, (i + 1) * most))",
            "test_chunks_are_even",
        ),
        (
            "        settings.fp32_precision = before",
            "        pass",
            "test_the_precision_of_other_products_is_left_as_it_was",
        ),
        ("a = a + poison", "pass", "test_out_of_range_poisons_its_own_row_only"),
    ),
    *mutants(
        "ual_kernels/_rows.py",
        LINEAR,
        (
            "return Kept(live.nonzero().squeeze(1), None, None)",
            "return Kept(torch.arange(len(target)), live, None)",
            "test_dead_rows_leave_before_the_first_product",
        ),
        (
            "dtype if dtype == torch.bfloat16 and not per_row",
            "dtype if dtype == torch.bfloat16",
            "test_sixteen_bits_are_rounded_once",
        ),
        (
            "dtype if dtype == torch.bfloat16 and not per_row",
            "dtype if not per_row",
            "test_float16_waits_for_the_loss_scale_in_float32",
        ),
        ("out.index_add_(0, y, rows)", "out[y] += rows", "test_every_flag"),
        (
            "torch.mul(block, factor, out=product)",
            "product.copy_(block)",
            "test_a_power_of_two_upstream_scales_a_16_bit_heads_gradient_exactly",
        ),
        (
            "class_weight[rows] @ block",
            "class_weight[: len(block)] @ block",
            "test_the_column_mean_of_a_head_of_many_blocks",
        ),
    ),
    *mutants(
        "ual_kernels/parallel.py",
        SHARDS,
        (
            "self.start = sum(counts[: dist.get_rank(group)])",
            "self.start = 0",
            "test_shards_are_the_whole_head",
        ),
        ("op=dist.ReduceOp.MAX, group", "group", "test_shards_are_the_whole_head"),
        ("torch.cat(everyone).topk(2, dim=0).values[1]", "second", "test_shards_are_the_whole_head"),
    ),
    *mutants(
        "ual_kernels/losses.py",
        LOSSES,
        ("statistics.log_prob.exp()", "statistics.top1_prob", "test_dft_is_the_gradient_of_the_probability"),
        (
            "statistics.entropy.clamp(min=0.0)",
            "statistics.entropy",
            "test_an_entropy_rounded_below_zero_is_zero",
        ),
        ("unit=math.log(top_k)", "unit=3.0", "test_eaft_weights_exceed_one_where_nothing_is_known"),
        ("shift=sigma, unit=1.0", "shift=1.0, unit=1.0", "test_miles_scale_is_a_division"),
        (
            '"logit_scale": logit_scale / beta',
            '"logit_scale": 1 / beta',
            "test_the_linear_loss_is_the_papers",
        ),
        (
            '"sample_weight": Constant(beta)',
            '"sample_weight": Constant(1.0)',
            "test_gems_value_is_beta_entropies_less",
        ),
        ("if not 0 < beta < math.inf", "if beta <= 0", "test_refusals_name_the_argument"),
    ),
    *mutants(
        "ual_kernels/modules.py",
        "tests/kernels/test_modules.py",
        ("return own | {", "return {", "test_every_option_arrives"),
        ("            live_rows=live_rows,\n", "", "test_every_option_arrives"),
        (
            'self.register_buffer("weight", weight)',
            "self.weight = weight",
            "test_only_the_class_weights_are_state",
        ),
    ),
    *mutants(
        "ual_kernels/_torch/cross_entropy.py",
        LOGITS,
        (
            "high = _shift_in_place(z)\n"
            "        gap = _weighted_mean(z, class_weight) - c_mean * (z_y - high)",
            "gap = _weighted_mean(z, class_weight) - c_mean * z_y\n        high = _shift_in_place(z)",
            "test_logits_far_from_zero",
        ),
        ("logits[chunk].to(acc, copy=True)", "logits[chunk].to(acc)", "test_every_flag"),
        ("p -= (scale * s / p.shape[1])[:, None]", "p -= (scale * s)[:, None]", "test_every_flag"),
        ("k + 2 * z_loss * lse", "k + z_loss * lse", "test_every_flag"),
        ("buffer.is_cpu and bool((scale == 1).all())", "buffer.is_cpu", "test_the_gradient_in_place"),
        (
            "return p.masked_fill_(~live[:, None], 0.0)",
            "return p",
            "test_what_an_ignored_row_holds_does_not_matter",
        ),
        (
            "torch.where(s == 0, 0.0, s * gap)",
            "s * gap",
            "test_forbidden_classes_cost_nothing_without_smoothing",
        ),
    ),
    *mutants(
        "ual_kernels/ops.py",
        LOGITS,
        ("if not torch.is_grad_enabled():", "if True:", "test_a_second_derivative_is_refused"),
        ("ctx.buffer, dloss), None", "ctx.buffer, dloss), ctx.buffer", "test_in_place_backward_runs_once"),
        (
            "dloss * row_scale * state[3], dloss * loss",
            "dloss * state[3], dloss * loss",
            "test_the_gradient_in_place",
        ),
    ),
    *mutants(
        "ual_kernels/ops.py",
        LINEAR,
        (
            "    with _as_given(tensors[0]):\n",
            "    if True:\n",
            "test_autocast_casts_the_operands_and_nothing_inside",
        ),
        ("tensors[7] = dloss * row_scale", "tensors[7] = row_scale", "test_every_flag"),
        ("upstream = torch.ones_like(dloss)", "pass", "test_every_flag"),
        ("scalar = upstream[:1].sum()", "scalar = upstream.sum()", "test_every_flag"),
        ("dloss * row_scale * state[1]", "dloss * state[1]", "test_every_flag"),
    ),
    *mutants(
        "ual_kernels/functional.py",
        LOGITS,
        ("return s if stretch == 1.0 else s * stretch", "return s", "test_every_flag"),
        (
            "torch.where((s >= 0) & (s <= 1), s, torch.nan)",
            "torch.where(s <= 1, s, torch.nan)",
            "test_out_of_range_poisons_its_own_row_only",
        ),
        ("torch.where(scale >= 0, scale, torch.nan)", "scale", "test_out_of_range_poisons_its_own_row_only"),
        (
            "labels = torch.where(scale == 0, ignore_index, labels)",
            "pass",
            "test_a_row_of_weight_zero_counts_for_nothing",
        ),
        (
            "total = row_scale.nansum()",
            "total = row_scale.sum()",
            "test_out_of_range_poisons_its_own_row_only",
        ),
        (
            "return torch.where(total == 0, 1.0, total)",
            "return total",
            "test_all_weights_zero_is_zero",
        ),
        (
            "row_scale = row_scale * of_target",
            "pass",
            "test_equals_pytorch_where_pytorch_can",
        ),
        ("target.reshape(-1).contiguous()", "target.reshape(-1)", "test_any_strides"),
        ("weight.to(acc).contiguous()", "weight.to(acc)", "test_any_strides"),
        ("owner = input if input._base is None else input._base", "owner = input", "test_in_place_refusals"),
        (
            "reshape(value.shape + missing)",
            "reshape(missing + value.shape)",
            "test_numbers_per_leading_index_are_spread_over_the_rest",
        ),
    ),
    *mutants(
        "ual_kernels/functional.py",
        LINEAR,
        ("head_grad and not per_row,", "grad and not per_row,", "test_a_frozen_head_gets_no_gradient"),
        (
            "rows.to(acc).masked_fill(dead, 0.0)",
            "rows.to(acc)",
            "test_what_an_ignored_row_holds_does_not_matter",
        ),
        ("chunk_tokens or 0,", "0,", "test_a_chunk_bounds_the_logits"),
    ),
    *mutants(
        "ual_kernels/reference.py",
        LOGITS,
        ("input.where(live[:, None], 0.0)", "input", "test_what_an_ignored_row_holds_does_not_matter"),
        (
            "torch.where((label_smoothing == 0) & uniform.isinf(), 0.0, uniform)",
            "uniform",
            "test_forbidden_classes_cost_nothing_without_smoothing",
        ),
        (
            "uniform = -(log_p * weight.to(nll.dtype)).mean(dim=-1)",
            "uniform = -log_p.mean(dim=-1)",
            "test_the_oracle",
        ),
        (
            "z_loss * torch.logsumexp(z, dim=-1).square()",
            "z_loss * torch.logsumexp(z, dim=-1)",
            "test_the_oracle",
        ),
        (
            "torch.where(live & ~legal, torch.nan, 1.0)",
            "torch.where(live & ~legal, 1.0, 1.0)",
            "test_out_of_range_poisons_its_own_row_only",
        ),
        ("softcap * torch.tanh(z / softcap)", "softcap * torch.tanh(input / softcap)", "test_the_oracle"),
    ),
    *mutants(
        "ual/smoothing.py",
        "tests/ual/test_smoothing.py",
        ("np.cumsum(count) - (count + 1) / 2", "np.cumsum(count) - 1", "TestScale"),
        (
            "minimum + (maximum - minimum) * values, minimum",
            "maximum - (maximum - minimum) * values, minimum",
            "TestSmooth",
        ),
        ("values = values**power", "values = values * power", "TestSmooth"),
        (
            "((maximum - target) / (maximum - mean))",
            "((maximum - mean) / (maximum - target))",
            "TestMatchMean",
        ),
        ("np.median(values[~missing])", "np.mean(values[~missing])", "TestFillMissing"),
    ),
    *mutants(
        "ual/reliability.py",
        "tests/ual/test_reliability.py",
        ("math.log(n / count)", "math.log2(n / count)", "TestEntropy"),
        ("for count in sorted(counts.values())", "for count in counts.values()", "TestEntropy"),
        ("h <= limit", "h < limit", "TestKeep"),
        (
            "(count - highest) / (len(answers) * temperature)",
            "(count - highest) / temperature",
            "TestAnswerWeights",
        ),
        ("(counts[answer], answer is not None)", "(counts[answer], True)", "TestMajority"),
    ),
    *mutants(
        "ual_kernels/_triton/linear_cross_entropy.py",
        "tests/kernels/test_linear_triton.py",
        (
            "keep = inside & (column[None, :] != y[:, None])",
            "keep = inside",
            "test_confident_rows_are_at_the_floor",
        ),
        (
            "at_target -= coefficient * rest",
            "at_target += coefficient * rest",
            "test_equals_the_torch_backend",
        ),
        (
            "inside = column[None, :] < V\n    keep",
            "inside = column[None, :] <= V\n    keep",
            "test_any_width",
        ),
        (
            "    elif tl.load(table_ptr + _TOTAL * M + row) < _LARGEST_TOTAL:",
            "    elif tl.load(table_ptr + _TOTAL * M + row) != 0.5:",
            "test_a_target_far_below_the_maximum",
        ),
        (
            "_LARGEST_TOTAL: tl.constexpr = tl.constexpr(2.0**100)",
            "_LARGEST_TOTAL: tl.constexpr = tl.constexpr(0.0)",
            "test_only_far_rows_are_made_again",
        ),
        (
            "rate = tl.where(rounded > 0.0, coefficient * rest / rounded, rate)",
            "rate = tl.where(rounded > 0.0, rest / rounded, rate)",
            "test_every_flag",
        ),
        (
            "    second = tl.where(tl.sum(largest.to(tl.int32), axis=1) > 1, high, second)",
            "    pass",
            "test_statistics",
        ),
        ("at_target = (at_target - s * c_y / V) * slope", "at_target = at_target * slope", "test_every_flag"),
        (
            "_FLOAT16_HEADROOM if x_dtype == torch.float16 else 0.0",
            "_FLOAT16_HEADROOM * 2",
            "test_other_dtypes",
        ),
        ("dbias += of_product @ x", "dbias += of_product @ rounded.float()", "test_a_trained_bias"),
        (
            "poison = torch.where(legal | ~alive, 0.0, torch.nan)",
            "poison = torch.where(legal, 0.0, 0.0)",
            "test_out_of_range_poisons_its_own_row_only",
        ),
    ),
    *mutants(
        "benchmarks/problems.py",
        BENCHMARKS,
        (
            "dz.scatter_add_(1, y, (s - 1)[:, None])",
            "dz.scatter_add_(1, y, -torch.ones_like(s)[:, None])",
            "test_the_exact_answer_is_the_definition",
        ),
        (
            '"dA": scale * (b.T @ gradients["dC"])',
            '"dA": b.T @ gradients["dC"]',
            "test_the_exact_answer_is_the_definition",
        ),
    ),
    *mutants(
        "benchmarks/report.py",
        BENCHMARKS,
        (
            'if "seconds" in row else math.inf',
            'if "seconds" in row else 0.0',
            "test_a_row_without_numbers_is_ranked_last",
        ),
        ("(y - my) for x, y in logs", "y for x, y in logs if x > mx", "test_a_slope_is_the_power"),
    ),
    *mutants(
        "benchmarks/compare.py",
        BENCHMARKS,
        (
            "bool(low > 1 + tolerance)",
            "bool(ratio > 1 + tolerance)",
            "test_a_regression_is_one_beyond_its_noise",
        ),
        (
            'np.asarray(s["it"]) / np.asarray(s[limit])',
            'np.asarray(s["it"])',
            "test_a_regression_is_one_beyond_its_noise",
        ),
        ("ratio <= ERROR_MARGIN", "ratio >= 0", "test_memory_errors_and_failures_are_regressions_too"),
    ),
    *mutants(
        "ual/uncertainty/parsing.py",
        "tests/elicit/test_parsing.py",
        (
            '    return value if 0 <= value <= 1 else "out of range"',
            "    return value % 1",
            "test_what_states_no_probability_says_why",
        ),
        ("    if len(values) > 1:", "    if len(values) > 9:", "test_what_states_no_probability_says_why"),
        (
            "if truncated and any(end >= len(text.rstrip())",
            "if truncated and any(end > len(text)",
            "test_a_number_at_the_edge_of_a_cut_reply_is_not_read",
        ),
        (
            "if comma and len(digits) == 3",
            "if comma and len(digits) == 9",
            "test_what_states_no_probability_says_why",
        ),
        (
            "        if match is None:  # a label",
            "        if False:  # a label",
            "test_what_states_no_probability_says_why",
        ),
        ("    if len(given) != 1 or", "    if", "test_what_states_no_probability_says_why"),
    ),
    *mutants(
        "ual/uncertainty/cache.py",
        "tests/elicit/test_cache.py",
        (
            "INSERT OR IGNORE INTO reply",
            "INSERT OR REPLACE INTO reply",
            "test_the_first_reply_of_a_key_stands_and_nothing_is_removed",
        ),
        (
            "isolation_level=None",
            'isolation_level="DEFERRED"',
            "test_a_killed_writer_loses_nothing_that_it_had_added",
        ),
        (
            "os.O_CREAT | os.O_RDWR, 0o600",
            "os.O_CREAT | os.O_RDWR, 0o644",
            "test_the_first_reply_of_a_key_stands_and_nothing_is_removed",
        ),
    ),
    *mutants(
        "ual/uncertainty/endpoint.py",
        "tests/elicit/test_endpoint.py",
        ("follow_redirects=False", "follow_redirects=True", "test_redirects_are_not_followed"),
        (
            "            self._left -= len(chunk)",
            "            self._left -= 0",
            "test_what_cannot_be_read_fails_in_bounded_time[endless-longer than max_response_bytes-1]",
        ),
        (
            "async with asyncio.timeout(self._config.timeout):",
            "if True:",
            "test_what_cannot_be_read_fails_in_bounded_time[drip-no reply within 0.4 s-2]",
        ),
        (
            "for name in set(request.headers) - _HEADERS:",
            "for name in ():",
            "test_the_key_is_sent_and_never_shown",
        ),
        (
            'return text.replace(self._key.get_secret_value(), "[key]") if self._key else text',
            "return text",
            "test_the_key_is_sent_and_never_shown",
        ),
        (
            "not allow_plain_http and not _loopback(host)",
            "not allow_plain_http and 'localhost' not in host and '127' not in host",
            "test_addresses_that_a_key_is_not_sent_to",
        ),
        (
            "if wait is not None and wait > _LONGEST_WAIT:",
            "if False:",
            "test_a_wait_too_long_is_a_failure_at_once",
        ),
        (
            "        async with self._slots:",
            "        if True:",
            "test_waiting_for_a_slot_is_not_waiting_for_the_reply",
        ),
        ("            await self._requests.acquire()", "            pass", "test_requests_per_minute"),
        (
            "used = most  # what was sent",
            "used = Spent(1)  # what was sent",
            "test_a_connection_that_broke_is_charged_in_full_since_it_may_have_been_answered",
        ),
    ),
    *mutants(
        "ual/uncertainty/meter.py",
        "tests/elicit/test_endpoint.py",
        (
            "self.before + self.spent + self._held + most",
            "self.before + self.spent + most",
            "test_the_budget_is_never_exceeded",
        ),
        (
            "                if not self._under_way:",
            "                if True:",
            "test_the_budget_is_never_exceeded",
        ),
    ),
    *mutants(
        "ual/uncertainty/session.py",
        "tests/elicit/test_run.py",
        (
            "        self._cache.add(key, reply)",
            "        pass",
            "test_rows_get_an_uncertainty_and_the_second_run_asks_nobody",
        ),
        (
            "if counts.in_a_row >= self._patience:",
            "if False:",
            "test_failures_are_counted_and_many_in_a_row_stop_the_run",
        ),
    ),
    *mutants(
        "ual/uncertainty/judge.py",
        "tests/elicit/test_estimators.py",
        (
            "sum(i * m for i, m in enumerate(mass)) / total",
            "sum(i * m for i, m in enumerate(mass))",
            "test_a_judge_takes_the_expected_score_over_the_token_that_states_it",
        ),
    ),
    *mutants(
        "ual/uncertainty/semantic_entropy.py",
        "tests/elicit/test_estimators.py",
        (
            "for first, second in ((a, b), (b, a)):",
            "for first, second in ((a, b),):",
            "test_semantic_entropy_clusters_by_entailment_in_both_directions",
        ),
    ),
    *mutants(
        "ual/uncertainty/rewording.py",
        "tests/elicit/test_estimators.py",
        (
            "return normalise(texts[letters.index(letter)])",
            "return letter",
            "test_options_are_permuted_and_answers_mapped_back",
        ),
        (
            "match[0][: match.start(2) - match.start()] + next(following)",
            "match[0].replace(match[2], next(following), 1)",
            "test_an_option_that_is_its_own_letter_keeps_its_label",
        ),
    ),
    *mutants(
        "ual/models/generate.py",
        "tests/elicit/test_local.py",
        (
            "picked[row] = scores[row] / temperature -",
            "picked[row] = scores[row] -",
            "test_draws_have_the_softmax_frequencies",
        ),
        (
            "generator=self._noise[row]",
            "generator=self._noise[0]",
            "test_draws_do_not_depend_on_the_rows_beside_them",
        ),
        (
            "        mask[row, longest - len(prompt.input_ids) :] = 1",
            "        mask[row] = 1",
            "test_greedy_is_the_argmax_at_every_step_whatever_the_padding",
        ),
    ),
    *mutants(
        "ual/evaluate/ranking.py",
        "tests/elicit/test_ranking.py",
        ("(below + good / 2)", "(below + good)", "test_against_the_definitions"),
        ("(g0 - a * n0) * steps", "(g0 + a * n0) * steps", "test_against_the_definitions"),
        (
            "    found, shown = np.cumsum(bad[::-1]), np.cumsum(size[::-1])",
            "    found, shown = np.cumsum(bad), np.cumsum(size)",
            "test_against_the_definitions",
        ),
    ),
    *mutants(
        "ual/report/elicitation.py",
        "tests/elicit/test_run.py",
        (
            "        autoescape=True,",
            "        autoescape=False,",
            "test_a_key_markup_and_formulas_in_what_a_model_says",
        ),
        (
            """    return f"'{text}" if text""",
            """    return text if text""",
            "test_a_key_markup_and_formulas_in_what_a_model_says",
        ),
    ),
    *mutants(
        "ual/data/pack.py",
        PACK,
        (
            "at = bisect_left(rooms, lengths[i])",
            "at = len(rooms)",
            "test_packing_prefers_the_fullest_sequence_that_has_room",
        ),
        (
            "key=lambda i: (-lengths[i], i)",
            "key=lambda i: i",
            "test_packing_prefers_the_fullest_sequence_that_has_room",
        ),
    ),
    *mutants(
        "ual/data/collate.py",
        PACK,
        ("            of_row[0] = IGNORE_INDEX\n", "            pass\n", "test_packed_is_unpacked"),
        (
            "torch.arange(n) for n in (*lengths, padding)",
            "torch.arange(length)",
            "test_packed_is_unpacked",
        ),
        (
            "torch.cat([smoothing, torch.zeros(1)]).repeat_interleave(spread)",
            "smoothing.mean().expand(length)",
            "test_packed_is_unpacked",
        ),
    ),
    *mutants(
        "ual/models/fused_loss.py",
        PACK,
        ('kwargs.setdefault("use_cache", False)', "pass", "test_a_cache_left_on_does_not_mix_rows"),
    ),
    *mutants(
        "ual/models/isolation.py",
        PACK,
        (
            "(beside - beside_other, 8 * eps",
            "(alone - alone, 8 * eps",
            "test_a_model_that_mixes_rows_is_refused",
        ),
        ("(beside - alone, eps**0.5", "(alone - alone, eps**0.5", "test_a_model_that_mixes_rows_is_refused"),
    ),
    *mutants(
        "ual/data/cache.py",
        "tests/ual/test_cache.py",
        (
            "[sample.id, chat, sample.tools]",
            "[sample.id]",
            "test_whatever_changes_the_tokens_is_in_the_key",
        ),
        (
            'arrays["checksum"].tobytes() != _checksum(tokens, trained)',
            "False",
            "test_a_damaged_file_is_made_again",
        ),
        ("renderer.counts.update(counts)", "pass", "test_a_second_run_reads_what_the_first_made"),
    ),
    *mutants(
        "ual/data/render.py",
        "tests/ual/test_tools.py",
        (
            "tools=list(tools) or None",
            "tools=None",
            "test_every_word_of_a_tool_row_is_rendered_and_the_assistants_trained",
        ),
        ("        self._check_tools(sample, text)\n", "", "test_a_template_that_leaves_tools_out_is_refused"),
        ("spans = spans[-1:]", "spans = spans[:1]", "test_only_the_last_turn_may_be_trained"),
    ),
    *mutants(
        "ual/data/streaming.py",
        "tests/ual/test_stream.py",
        (
            "default_rng([self._seed, self._epoch])",
            "default_rng(self._seed)",
            "test_an_epochs_order_is_its_own_and_always_the_same",
        ),
        (
            "islice(rows, self._buffer)",
            "islice(rows, self._buffer - 1)",
            "test_an_epochs_order_is_its_own_and_always_the_same",
        ),
        (
            "        if count != len(self._smoothing):",
            "        if False:",
            "test_a_file_that_changes_under_a_run_stops_it",
        ),
    ),
    *mutants(
        "ual/train/seen.py",
        "tests/ual/test_seen.py",
        (
            "if values.ndim == 1 else values[:, :-1]",
            "if values.ndim == 1 else values[:, 1:]",
            "test_spread",
        ),
        ("else groups[:, :-1]", "else groups[:, :1]", "test_sums_by_hand"),
        ("torch.where(groups < 0, nowhere, groups)", "groups.clamp(min=0)", "test_sums_by_hand"),
        ("live.numel() + len(live)", "live.numel()", "test_sums_by_hand"),
    ),
    *mutants(
        "ual/models/memory.py",
        "tests/ual/test_estimate.py",
        (
            "if key in self._known or key in self._counted",
            "if key in self._counted",
            "test_weights_are_no_part_of_a_steps_activations",
        ),
        ("            self._live -= size\n", "", "test_a_real_steps_peak_is_what_was_estimated"),
    ),
    *mutants(
        "ual/train/estimate.py",
        "tests/ual/test_estimate.py",
        ("gpus if zero >= 2 else 1", "gpus if zero >= 1 else 1", "test_zero_shards_by_its_stages"),
        ("(4 * (states + 1))", "(4 * states)", "test_zero_shards_by_its_stages"),
    ),
    *mutants(
        "ual/models/merge.py",
        "tests/ual/test_adapters.py",
        (
            "    _untie(loaded)  #",
            "    #",
            "test_an_adapter_is_trained_fused_as_unfused_and_merges[head adapted]",
        ),
        ('"dtype": "float32", "quantization"', '"quantization"', "test_merging_rounds_once"),
    ),
    *mutants(
        "ual/preview.py",
        "tests/ual/test_preview.py",
        ("trained = [False, *(", "trained = [True, *(", "test_what_is_shown_is_what_is_trained"),
        ("elif sample.sample_weight == 0:", "elif False:", "test_every_row_is_counted_once_with_its_reason"),
    ),
    *mutants(
        "ual/train/checkpoint.py",
        "tests/faults/test_checkpoints.py",
        ("if present != set(files):", "if set(files) - present:", "test_a_damaged_checkpoint_is_passed_over"),
        (
            '!= recorded["sha256"]:',
            '!= recorded["sha256"] and not recorded["bytes"]:',
            "test_a_damaged_checkpoint_is_passed_over",
        ),
        ("        (int(number), path)", "        (number, path)", "test_a_damaged_checkpoint_is_passed_over"),
        ("if free < size:", "if free < 0:", "test_a_checkpoint_that_does_not_fit_is_not_begun"),
    ),
    *mutants(
        "ual/train/folder.py",
        "tests/faults/test_checkpoints.py",
        ("elif resume is True:", "elif resume:", "test_nothing_to_go_on_with"),
    ),
    *mutants(
        "ual/train/folder.py",
        "tests/faults/test_bad_input.py",
        (
            "for folder in (self.path, self.checkpoints):",
            "for folder in (self.path,):",
            "test_a_read_only_folder_is_refused_before_the_model_is_loaded",
        ),
    ),
    *mutants(
        "ual/train/ranks.py",
        "tests/faults/test_checkpoints.py",
        (
            'or "gloo/transport" in str(error)',
            "",
            "test_a_process_that_is_gone_is_not_taken_for_a_full_disk",
        ),
    ),
    *mutants(
        "ual/train/callbacks.py",
        "tests/faults/test_checkpoints.py",
        (
            "if not ranks.highest(mine):",
            "if mine or not ranks.highest(mine):",
            "test_a_gradient_that_is_not_finite_names_the_samples",
        ),
    ),
    *mutants(
        "ual/train/zero.py",
        "tests/faults/test_checkpoints.py",
        (
            "if stage(values) == 3 and not",
            "if stage(values) == 4 and not",
            "test_a_deepspeed_file_is_checked",
        ),
        (
            'if (hint := nearest(key, _KEYS)).startswith("did',
            'if (hint := "").startswith("did',
            "test_a_deepspeed_file_is_checked",
        ),
    ),
    *mutants(
        "ual/train/loss.py",
        "tests/invariants/test_loss_kinds.py",
        ("return loss / mean.nan_to_num(nan=1.0)", "return loss", "test_the_loss_is_its_definition"),
        ("losses.eaft(config.top_k, config.alpha)", "losses.eaft()", "test_the_loss_is_its_definition"),
        ("losses.mile(config.gamma, config.sigma)", "losses.mile()", "test_the_loss_is_its_definition"),
    ),
    *mutants(
        "ual/models/score.py",
        "tests/ual/test_score.py",
        (
            "            if mine >= len(starts):\n                continue\n",
            "",
            "test_shares_together_are_the_whole",
        ),
        ("mine = turn * world_size + rank", "mine = turn * world_size", "test_shares_together_are_the_whole"),
    ),
]
_SAME_WEIGHTS = "test_whatever_launched_and_stopped_it_the_weights_are_the_same"
SLOW = [  # minutes each, because their tests start launchers: tried only where all parts are
    *mutants(
        "ual/train/adapter_state.py",
        "tests/faults/test_launches.py",
        ('{"step": whole["step"][0].clone()}', '{"step": 0 * whole["step"][0]}', _SAME_WEIGHTS),
        (
            "safe_get_full_optimizer_state(p, key)",
            'safe_get_full_optimizer_state(p, "exp_avg")',
            _SAME_WEIGHTS,
        ),
    ),
    *mutants(
        "ual/train/trainer.py",
        "tests/faults/test_launches.py",
        ('            group["lr"] = rate', "            pass", _SAME_WEIGHTS),
    ),
]


def copy_of_the_tree(tree: Path) -> Path:
    for name in ("ual", "ual_kernels", "benchmarks", "tests"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    shutil.copy(ROOT / "pyproject.toml", tree)
    data = ROOT.parent / "shared"
    if data.is_dir() and not (tree.parent / "shared").exists():
        (tree.parent / "shared").symlink_to(data)
    return tree


def run(tree: Path, mutant: Mutant) -> None:
    """In a process of its own: break the copy, run the tests there, and leave with their exit code."""
    code = 99
    try:
        os.chdir(tree)
        sys.path.insert(0, str(tree))
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        source = tree / mutant.file
        source.write_text(source.read_text().replace(mutant.good, mutant.bad))
        code = pytest.main(["-q", "-x", "-p", "no:cacheprovider", *mutant.tests])
    finally:
        os._exit(code)


def attempts(chosen: list[Mutant], folder: Path) -> Iterator[tuple[Mutant, int]]:
    """Each mutant with the exit code of its tests, as they end."""
    fork = get_context("fork")
    waiting, running = deque(enumerate(chosen)), {}
    while waiting or running:
        while waiting and len(running) < WORKERS:
            number, mutant = waiting.popleft()
            process = fork.Process(target=run, args=(copy_of_the_tree(folder / str(number)), mutant))
            process.start()
            running[process.sentinel] = process, mutant
        for sentinel in connection.wait(list(running)):
            process, mutant = running.pop(sentinel)
            process.join()
            yield mutant, process.exitcode


def verdict(code: int) -> str:
    """pytest says 1 when tests fail; a signal is negative; everything else ran no test."""
    return {0: "survived", 1: "killed"}.get(code, "killed" if code < 0 else f"ran no test (exit code {code})")


def prepare() -> None:
    """Stay on the CPU, where a wild address ends a process and not a driver; import what all forks need."""
    os.environ |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    sys.dont_write_bytecode = True
    for module in ("torch._dynamo", "triton"):
        importlib.import_module(module)


def turn(parts: int) -> int:
    """Which of so many parts it is this commit's turn to try."""
    said = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return int(said.stdout.strip() or "0", 16) % parts


def main(word: str, parts: int) -> int:
    prepare()
    everything = [*MUTANTS, *SLOW]
    among = everything if parts == 1 else MUTANTS
    chosen = [mutant for mutant in among if word in mutant.file][turn(parts) :: parts]
    problems = [
        f"{mutant.file}: not one place to break: {mutant.good!r}"
        for mutant in everything
        if (ROOT / mutant.file).read_text().count(mutant.good) != 1
    ]
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        needed = sorted({test for mutant in chosen for test in mutant.tests})
        parts = [tuple(needed[i::WORKERS]) for i in range(WORKERS)]
        unbroken = [Mutant("pyproject.toml", "", "", part) for part in parts if part]
        if any(code for _, code in attempts(unbroken, Path(folder, "unbroken"))):
            print("the unbroken code fails: nothing below would mean anything")
            return 1
        for mutant, code in attempts(chosen, Path(folder, "broken")):
            print(f"{verdict(code):9} {mutant.file}: {mutant.good.splitlines()[-1].strip()}", flush=True)
            if verdict(code) != "killed":
                problems.append(f"{mutant.file}: {verdict(code)}: {mutant.good!r} -> {mutant.bad!r}")
    print(
        f"{len(chosen) - len(problems)} of {len(chosen)} mutants killed in {time.monotonic() - start:.0f} s"
    )
    print(*problems, sep="\n")
    return bool(problems)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        "tests/mutants.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("word", nargs="?", default="", help="only files whose path contains it")
    parser.add_argument("--parts", type=int, default=1, help="try one of so many parts, by the commit")
    given = parser.parse_args()
    sys.exit(main(given.word, given.parts))
