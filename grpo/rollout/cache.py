"""Keys and values of what is being written: each prompt's once, beside its completions' own.

Shape letters as in `models/attention.py`: H heads, K heads of keys and values (H = K·r), width d.
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
    """What one layer of the model keeps."""

    prompt_keys: Tensor  # [B, K, P, d]
    prompt_values: Tensor
    keys: Tensor  # [N, K, C, d], of which the first `written` columns are there
    values: Tensor


class KVCache:
    """The attention of one more token of each row, which sees its prompt and what it wrote so far.

    All rows have written the same number of tokens; one that is done can be dropped.
    """

    def __init__(
        self, prompt_lengths: Sequence[int], group: int, longest: int, device: torch.device
    ) -> None:
        """longest: tokens that a completion may have."""
        self.longest, self.num_written = longest, 0
        self.lengths_B = torch.tensor(prompt_lengths, device=device)
        self.prompt_N = torch.arange(len(prompt_lengths), device=device).repeat_interleave(group)
        self.layers: dict[int, LayerCache] = {}
        self._arrange()

    def _arrange(self) -> None:
        """Rows of a prompt stand in one block, so that they ask its keys in one product."""
        rows_B = torch.bincount(self.prompt_N, minlength=len(self.lengths_B))
        slots_S = torch.arange(int(rows_B.max()), device=rows_B.device)
        filled_BS = slots_S < rows_B[:, None]
        first_B1 = (rows_B.cumsum(0) - rows_B)[:, None]
        self.equal_groups = bool(filled_BS.all())
        # Where a prompt has fewer rows, its first stands in for those that are gone.
        self.row_BS = first_B1 + torch.where(filled_BS, slots_S, 0)
        self.slot_N = filled_BS.flatten().nonzero()[:, 0]
        self.positions_P = torch.arange(int(self.lengths_B.max()), device=rows_B.device)
        there_BP = self.positions_P < self.lengths_B[:, None]
        self.prompt_key_mask = None if bool(there_BP.all()) else KeyMask(there_BP[:, None, None])
        self.window_masks: dict[
            tuple[int, int], tuple[KeyMask, KeyMask]
        ] = {}  # of the newest token alone

    def next_positions(self) -> Tensor:
        """[N] of the tokens that come next."""
        return self.lengths_B[self.prompt_N] + self.num_written

    def keep_rows(self, rows: Tensor) -> None:
        """Drops all rows but these, given in order, and the prompts that none of them continues."""
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
        """Takes what a forward pass over some of the prompts, the first of them given, has made."""
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
        """[N, H, d] as `Plan.attend` says, for one token a row."""
        own, column = self.layers[layer], self.num_written
        if self._suits_kernel(own, scoring):
            keys = kernel.KeyValueBuffers(
                own.prompt_keys, own.prompt_values, own.keys, own.values,
                self.prompt_N, self.lengths_B,
            )  # fmt: skip
            asked, key, value = (x.transpose(0, 1) for x in (queries_HTd, keys_KTd, values_KTd))
            return keys.attend(asked, key, value, column, scoring.scale, scoring.window)
        own.keys[:, :, column] = keys_KTd.transpose(0, 1)
        own.values[:, :, column] = values_KTd.transpose(0, 1)
        count, heads = queries_HTd.shape[1], keys_KTd.shape[0]
        queries_NKrd = queries_HTd.transpose(0, 1).unflatten(1, (heads, -1))
        of_prompts, of_own = self._key_masks(scoring.window)
        to_prompt, prompt_NKr = attend_with_logsumexp(
            self._stack_rows(queries_NKrd), own.prompt_keys, own.prompt_values, scoring, of_prompts
        )
        written = slice(column + 1)
        to_own, own_NKr = attend_with_logsumexp(
            queries_NKrd, own.keys[:, :, written], own.values[:, :, written], scoring, of_own
        )
        share_NKr = torch.sigmoid(self._unstack_rows(prompt_NKr[..., None]) - own_NKr[..., None])
        out = torch.lerp(to_own.float(), self._unstack_rows(to_prompt).float(), share_NKr)
        return out.reshape(count, -1, out.shape[-1]).to(queries_HTd.dtype)

    @staticmethod
    def _suits_kernel(own: LayerCache, scoring: AttentionScoring) -> bool:
        keys = own.keys
        return (
            (keys.device.type, keys.dtype, scoring.softcap) == ("cpu", torch.float32, None)
            and keys.shape[-1] % kernel.MAX_LANES == 0
            and kernel.load_kernel() is not None
        )

    def _key_masks(self, window: int | None) -> tuple[KeyMask | None, KeyMask | None]:
        """Of its prompt and of its own tokens, what the next token of a row sees; None: all."""
        if window is None or window >= self.positions_P.shape[0] + self.longest:
            return self.prompt_key_mask, None
        if (window, self.num_written) not in self.window_masks:
            from_B111 = (self.lengths_B + self.num_written)[:, None, None, None]
            columns_C = torch.arange(self.num_written + 1, device=self.lengths_B.device)
            inside = causal_mask(from_B111, self.positions_P, window)
            within = KeyMask(inside & (self.positions_P < from_B111 - self.num_written))
            own = KeyMask(causal_mask(columns_C[-1:], columns_C, window)[None, None, None])
            self.window_masks = {(window, self.num_written): (within, own)}
        return self.window_masks[window, self.num_written]

    def _stack_rows(self, x_NKrd: Tensor) -> Tensor:
        """[B, K, S·r, d] the rows of each prompt side by side."""
        x_BSKrd: Tensor
        if self.equal_groups:
            x_BSKrd = x_NKrd.unflatten(0, (len(self.lengths_B), -1))
        else:
            x_BSKrd = x_NKrd[self.row_BS]
        return x_BSKrd.transpose(1, 2).flatten(2, 3)

    def _unstack_rows(self, x_BKSd: Tensor) -> Tensor:
        """[N, K, r, d] each row by itself again."""
        slots = self.row_BS.shape[1]
        x_NKrd: Tensor = x_BKSd.unflatten(2, (slots, -1)).transpose(1, 2).flatten(0, 1)
        return x_NKrd if self.equal_groups else x_NKrd[self.slot_N]


@dataclass(frozen=True)
class PrefillPlan:
    """A plan of attention for some of the prompts, which leaves its keys and values in a cache."""

    cache: KVCache
    first: int
    tree: Tree

    def attend(
        self,
        layer: int,
        queries_HTd: Tensor,
        keys_KTd: Tensor,
        values_KTd: Tensor,
        scoring: AttentionScoring,
    ) -> Tensor:
        """As `Plan.attend` says."""
        self.cache.store_prompts(layer, self.first, keys_KTd, values_KTd, self.tree)
        return TreePlan(self.tree).attend(layer, queries_HTd, keys_KTd, values_KTd, scoring)
