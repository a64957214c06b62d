"""A site: a selection, the node, and the far field."""

from torch import Tensor, nn

from sparsify_compiler.exporting.standard.cube_blocks import CubeBlocks
from sparsify_compiler.exporting.standard.far_field import (
    Merge,
    VirtualKeys,
    far_of,
    first_order,
    queries_of,
    statistics,
)
from sparsify_compiler.exporting.standard.node import Attend, Bodies
from sparsify_compiler.exporting.standard.operations import laid_out, take
from sparsify_compiler.exporting.standard.selection import by_gain, by_mass
from sparsify_compiler.methods import StaticMethod
from sparsify_compiler.methods.cubes import Cubes
from sparsify_compiler.plan import AttentionPlan
from sparsify_compiler.table import BlockTable


def standard_site(plan: AttentionPlan, bodies: Bodies | None = None) -> nn.Module:
    """A site in standard operators: out [B, H, S, Dv] of query, key, value and key_bias.

    Args:
        bodies: gets the body of the node when it is exported.
    """
    attend = Attend(plan, bodies)
    return StaticSite(attend, plan) if isinstance(plan.settings, StaticMethod) else CubesSite(attend, plan)


class StaticSite(nn.Module):
    """A site whose table is known beforehand."""

    def __init__(self, attend: Attend, plan: AttentionPlan) -> None:
        super().__init__()
        self.attend = attend
        assert isinstance(plan.settings, StaticMethod)
        for name, tensor in plan.settings.table(plan.layout).tensors().items():
            self.register_buffer(name, tensor, persistent=False)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, key_bias: Tensor | None) -> Tensor:
        table = [getattr(self, name) for name in BlockTable.__slots__]
        return laid_out(self.attend(query, key, value, table, key_bias)[0])


class CubesSite(nn.Module):
    """A site of method `cubes` with a fixed number of blocks."""

    def __init__(self, attend: Attend, plan: AttentionPlan) -> None:
        super().__init__()
        self.attend, self.blocks = attend, CubeBlocks(plan)
        assert isinstance(plan.settings, Cubes)
        self.scale, self.far_field = plan.site.scale, plan.far_field
        self.by_gain = plan.settings.reads_by_gain(plan.far_field)
        self.merge = Merge(self.blocks, self.scale)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, key_bias: Tensor | None) -> Tensor:
        blocks, scale, linear = self.blocks, self.scale, self.far_field == "linear"
        rows = take(query, blocks.q_tokens)
        if self.far_field == "drop":
            chosen = by_mass(blocks, rows, key, key_bias, scale)
            return laid_out(self.attend(query, key, value, blocks.table(chosen), key_bias)[0])
        found = statistics(key, value, key_bias, blocks.kv_tokens, blocks.kv_real, linear=linear)
        found = found.of_heads(query.shape[1])
        virtual = VirtualKeys(found, found.log_weight)
        if linear:
            queries = queries_of(blocks, query, rows, scale)
            virtual = queries.virtual_keys(found)
            scores = queries.scores(virtual)
        if self.by_gain:
            chosen = by_gain(blocks, queries, virtual, scores, key, value, key_bias)
        else:
            chosen = by_mass(blocks, rows, key, key_bias, scale)
        out, lse = self.attend(query, key, value, blocks.table(chosen), key_bias)
        assert lse is not None
        scaled = rows * scale
        far = far_of(virtual, scaled, chosen)
        if linear:
            far = far._replace(first_order=first_order(found, scores, scaled, chosen))
        return laid_out(self.merge(blocks, query, key, value, key_bias, (out, lse), far))
