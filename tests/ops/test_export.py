"""torch.export of every op, and one case of each group through inductor."""

import pytest
import torch
import torch._inductor.config as inductor
from cases import CASES


class Module(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *leaves):
        return self.function(*leaves)


@pytest.mark.parametrize("name", CASES)
def test_exported_program_is_equal(name, device, generator):
    function, leaves = CASES[name](device, generator)
    program = torch.export.export(Module(function), tuple(leaves), strict=False)
    assert any("text3d" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(*leaves), function(*leaves))


def test_exported_program_checks_shapes(device, generator):
    function, leaves = CASES["hash_grid"](device, generator)
    points = torch.export.Dim("points", min=2, max=100)
    program = torch.export.export(Module(function), tuple(leaves), dynamic_shapes=(({0: points}, None),), strict=False)
    more = torch.rand(9, 3, device=device)
    torch.testing.assert_close(program.module()(more, leaves[1]), function(more, leaves[1]))
    graph = torch.fx.GraphModule(program.graph_module, program.graph)  # without the guards that export itself adds
    operator = next(node for node in graph.graph.nodes if "text3d" in str(node.target))
    with pytest.raises(ValueError, match=r"x: expected shape \[points, 3\], got \[9, 2\]"):
        operator.target(more[:, :2], leaves[1], *operator.args[2:])


@pytest.mark.parametrize("name", ["composite", "hash_grid_half", "texture"])
def test_inductor(name, device, generator):
    function, leaves = CASES[name](device, generator)
    tracked = [leaf.clone().requires_grad_() for leaf in leaves]
    loss = lambda *leaves: function(*leaves).square().sum()
    expected = torch.autograd.grad(loss(*tracked), tracked)
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True)
    with inductor.patch({"cpp.cxx": (None, "c++")}):  # CXX may be two words, which inductor does not take
        torch.testing.assert_close(torch.autograd.grad(compiled(*tracked), tracked), expected)
