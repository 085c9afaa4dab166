"""The key-value cache of a rollout: each prompt once, and each completion's tokens.

Shape letters as in `models/attention.py`: H query heads, K key-value heads (H = K·r), width d.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo.models.attention import KeyMask, TreePlan, attend_with_logsumexp, causal_mask
from grpo.models.attention_plan import AttentionScoring
from grpo.models.cpu import kernel
from grpo.models.tree import Tree, pad_parts


@dataclass
class LayerCache:
    """Keys and values of one layer of the model."""

    prompt_keys: Tensor  # [B, K, P, d]
    prompt_values: Tensor
    keys: Tensor  # [N, K, C, d], of which the first `num_written` columns are filled
    values: Tensor


class KVCache:
    """Attends from one new token of each row to the row's prompt and to its tokens so far.

    All rows have the same number of tokens; rows that have ended can be dropped.
    """

    def __init__(
        self, prompt_lengths: Sequence[int], group: int, longest: int, device: torch.device
    ) -> None:
        """
        Args:
            prompt_lengths: tokens of each of the B prompts.
            group: completions a prompt.
            longest: the most tokens of a completion.
        """
        self.longest, self.num_written = longest, 0
        self.lengths_B = torch.tensor(prompt_lengths, device=device)
        self.prompt_N = torch.arange(len(prompt_lengths), device=device).repeat_interleave(group)
        self.layers: dict[int, LayerCache] = {}
        self._arrange()

    def _arrange(self) -> None:
        """Finds each prompt's block of rows, whose scores with its keys are one product."""
        rows_B = torch.bincount(self.prompt_N, minlength=len(self.lengths_B))
        slots_S = torch.arange(int(rows_B.max()), device=rows_B.device)
        filled_BS = slots_S < rows_B[:, None]
        first_B1 = (rows_B.cumsum(0) - rows_B)[:, None]
        self.equal_groups = bool(filled_BS.all())
        # If a prompt has fewer rows than others, its first row fills the places of dropped ones.
        self.row_BS = first_B1 + torch.where(filled_BS, slots_S, 0)
        self.slot_N = filled_BS.flatten().nonzero()[:, 0]
        self.positions_P = torch.arange(int(self.lengths_B.max()), device=rows_B.device)
        real_BP = self.positions_P < self.lengths_B[:, None]
        self.prompt_key_mask = None if bool(real_BP.all()) else KeyMask(real_BP[:, None, None])
        # By window and number of tokens; holds only the newest token's masks.
        self.window_masks: dict[tuple[int, int], tuple[KeyMask, KeyMask]] = {}

    def next_positions(self) -> Tensor:
        """Returns the positions [N] of the rows' next tokens."""
        return self.lengths_B[self.prompt_N] + self.num_written

    def keep_rows(self, rows: Tensor) -> None:
        """Drops all rows except these (indices in ascending order), and prompts without rows."""
        self.prompt_N = self.prompt_N[rows]
        prompts, self.prompt_N = self.prompt_N.unique(return_inverse=True)
        dropped = len(prompts) < len(self.lengths_B)
        self.lengths_B = self.lengths_B[prompts]
        for layer in self.layers.values():
            if dropped:
                longest = int(self.lengths_B.max())
                layer.prompt_keys = layer.prompt_keys[prompts, :, :longest].contiguous()
                layer.prompt_values = layer.prompt_values[prompts, :, :longest].contiguous()
            for name in ("keys", "values"):
                old = getattr(layer, name)
                new = old.new_empty(len(rows), *old.shape[1:])
                new[:, :, : self.num_written] = old[rows, :, : self.num_written]
                setattr(layer, name, new)
        self._arrange()

    def store_prompts(
        self, number: int, first: int, keys_KTd: Tensor, values_KTd: Tensor, tree: Tree
    ) -> None:
        """Stores a layer's keys and values of some of the prompts.

        Args:
            number: the layer's.
            first: the index of the first of these prompts.
            tree: the prompts, as the forward pass read them.
        """
        if number not in self.layers:
            heads, _, width = keys_KTd.shape
            prompts = (len(self.lengths_B), heads, int(self.lengths_B.max()), width)
            rows = (len(self.prompt_N), heads, self.longest, width)
            self.layers[number] = LayerCache(
                keys_KTd.new_zeros(prompts),
                values_KTd.new_zeros(prompts),
                keys_KTd.new_empty(rows),
                values_KTd.new_empty(rows),
            )
        layer = self.layers[number]
        for whole, part in ((layer.prompt_keys, keys_KTd), (layer.prompt_values, values_KTd)):
            part_BKPd = pad_parts(part, tree.prompt_slices)
            whole[first : first + len(part_BKPd), :, : part_BKPd.shape[2]] = part_BKPd

    def attend(
        self,
        layer: int,
        queries_HTd: Tensor,
        keys_KTd: Tensor,
        values_KTd: Tensor,
        scoring: AttentionScoring,
    ) -> Tensor:
        """Implements `AttentionPlan.attend` for one token a row: returns [N, H, d]."""
        cached, column = self.layers[layer], self.num_written
        if self._suits_kernel(cached, scoring):
            buffers = kernel.KeyValueBuffers(
                cached.prompt_keys, cached.prompt_values, cached.keys, cached.values,
                self.prompt_N, self.lengths_B,
            )  # fmt: skip
            query, key, value = (x.transpose(0, 1) for x in (queries_HTd, keys_KTd, values_KTd))
            return buffers.attend(query, key, value, column, scoring.scale, scoring.window)
        cached.keys[:, :, column] = keys_KTd.transpose(0, 1)
        cached.values[:, :, column] = values_KTd.transpose(0, 1)
        count, heads = queries_HTd.shape[1], keys_KTd.shape[0]
        queries_NKrd = queries_HTd.transpose(0, 1).unflatten(1, (heads, -1))
        prompt_mask, row_mask = self._key_masks(scoring.window)
        prompt_out, prompt_normalizer = attend_with_logsumexp(
            self._stack_rows(queries_NKrd),
            cached.prompt_keys,
            cached.prompt_values,
            scoring,
            prompt_mask,
        )
        written = slice(column + 1)
        row_out, row_normalizer_NKr = attend_with_logsumexp(
            queries_NKrd,
            cached.keys[:, :, written],
            cached.values[:, :, written],
            scoring,
            row_mask,
        )
        prompt_share_NKr1 = torch.sigmoid(
            self._unstack_rows(prompt_normalizer[..., None]) - row_normalizer_NKr[..., None]
        )
        out = torch.lerp(row_out.float(), self._unstack_rows(prompt_out).float(), prompt_share_NKr1)
        return out.reshape(count, -1, out.shape[-1]).to(queries_HTd.dtype)

    @staticmethod
    def _suits_kernel(cached: LayerCache, scoring: AttentionScoring) -> bool:
        keys = cached.keys
        return (
            (keys.device.type, keys.dtype, scoring.softcap) == ("cpu", torch.float32, None)
            and keys.shape[-1] % kernel.MAX_LANES == 0
            and kernel.load_kernel() is not None
        )

    def _key_masks(self, window: int | None) -> tuple[KeyMask | None, KeyMask | None]:
        """Returns which keys of its prompt and of its own tokens a row's next token sees.

        None means all of them.
        """
        if window is None or window >= self.positions_P.shape[0] + self.longest:
            return self.prompt_key_mask, None
        if (window, self.num_written) not in self.window_masks:
            from_B111 = (self.lengths_B + self.num_written)[:, None, None, None]
            columns_C = torch.arange(self.num_written + 1, device=self.lengths_B.device)
            seen_B11P = causal_mask(from_B111, self.positions_P, window)
            prompt_mask = KeyMask(seen_B11P & (self.positions_P < from_B111 - self.num_written))
            row_mask = KeyMask(causal_mask(columns_C[-1:], columns_C, window)[None, None, None])
            self.window_masks = {(window, self.num_written): (prompt_mask, row_mask)}
        return self.window_masks[window, self.num_written]

    def _stack_rows(self, x_NKrd: Tensor) -> Tensor:
        """Returns [B, K, S·r, d]: the rows of each prompt side by side, in S slots."""
        x_BSKrd: Tensor
        if self.equal_groups:
            x_BSKrd = x_NKrd.unflatten(0, (len(self.lengths_B), -1))
        else:
            x_BSKrd = x_NKrd[self.row_BS]
        return x_BSKrd.transpose(1, 2).flatten(2, 3)

    def _unstack_rows(self, x_BKSd: Tensor) -> Tensor:
        """Returns [N, K, r, d]: reverses `_stack_rows`."""
        slots = self.row_BS.shape[1]
        x_NKrd: Tensor = x_BKSd.unflatten(2, (slots, -1)).transpose(1, 2).flatten(0, 1)
        return x_NKrd if self.equal_groups else x_NKrd[self.slot_N]


@dataclass(frozen=True)
class PrefillPlan:
    """An attention plan for some of the prompts, which stores their keys and values in a cache."""

    cache: KVCache
    first: int  # the index of the first of these prompts
    tree: Tree

    def attend(
        self,
        layer: int,
        queries_HTd: Tensor,
        keys_KTd: Tensor,
        values_KTd: Tensor,
        scoring: AttentionScoring,
    ) -> Tensor:
        """Implements `AttentionPlan.attend`."""
        self.cache.store_prompts(layer, self.first, keys_KTd, values_KTd, self.tree)
        return TreePlan(self.tree).attend(layer, queries_HTd, keys_KTd, values_KTd, scoring)
