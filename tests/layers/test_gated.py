from typing import Any

import pytest
import torch
from torch import Tensor

from tests.golden import TOLERANCE, assert_grad_norms, golden, golden_input, relative_error
from visionattn.layers.attention.gated import GATES, GatedAttention
from visionattn.models._checkpoint import OfficialWeights
from visionattn.models.gated_vit import GatedViT

PREFIX = "stages.0.attn."


class Layer(OfficialWeights, GatedAttention):
    """The layer, with the model's map of official keys."""

    def from_official(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        model = GatedViT(dim=self.proj.in_features, depth=1, num_heads=self.num_heads, img_size=16)
        state = model.from_official({f"blocks.0.attn.{k}": v for k, v in state.items()})
        return {k.removeprefix(PREFIX): v for k, v in state.items()}


def layer(**kwargs: Any) -> GatedAttention:
    torch.manual_seed(0)
    return GatedAttention(32, num_heads=4, **kwargs)


@pytest.mark.parametrize(
    ("variant", "kwargs"), [("clip_alpha4", {"clip": (-4 / 197, 1.0)}), ("gate_mlp2", {"gate": "mlp2"})]
)
def test_computes_what_the_authors_code_computes(variant: str, kwargs: dict[str, Any]) -> None:
    case = golden(f"gated_op/attn_{variant}_d384_h6")
    attn = Layer(384, num_heads=6, **kwargs)
    attn.load_state_dict(attn.from_official(case.state_dict))
    for i, recording in enumerate(case.manifest["cases"]):
        x = golden_input(tuple(recording["input_shape"]), recording["seed"])
        assert relative_error(attn(x), case.recorded(f"case{i}.logits")) <= TOLERANCE
        if "grad_norms" in recording:
            assert_grad_norms(case, attn, x, recording["grad_norms"])


@pytest.mark.parametrize("clip", [None, (-0.02, 1.0)], ids=str)
@pytest.mark.parametrize("gate", GATES)
def test_an_open_gate_changes_nothing_and_a_shut_one_stops_all(gate: str, clip: tuple[float, float] | None) -> None:
    attn, x = layer(gate=gate, clip=clip), torch.randn(2, 9, 32)
    plain = layer(clip=clip)
    plain.load_state_dict({k: v for k, v in attn.state_dict().items() if not k.startswith("gate.")})
    last = (
        attn.gate.logit if gate == "unconditional" else [p for n, p in attn.gate.named_parameters() if "bias" in n][-1]
    )
    with torch.no_grad():
        last.fill_(40.0)
        torch.testing.assert_close(attn(x), plain(x))
        last.fill_(-40.0)
        torch.testing.assert_close(attn(x), attn.proj.bias.expand_as(x))


@pytest.mark.parametrize("gate", GATES)
def test_gates_have_the_grain_of_their_kind(gate: str) -> None:
    attn, x = layer(gate=gate), torch.randn(2, 9, 32)
    shape = {"unconditional": (1, 1, 4, 1), "elementwise": (2, 9, 4, 8)}.get(gate, (2, 9, 4, 1))
    assert attn.gate(x).shape == shape
    assert attn.average_gate == gate.startswith("per_head")


@pytest.mark.parametrize("gate", ["linear", "mlp", "mlp2"])
def test_a_head_sees_its_own_channels_alone(gate: str) -> None:
    attn, x = layer(gate=gate), torch.randn(2, 9, 32)
    other = x.clone()
    other[..., 8:16] += 1
    changed = (attn.gate(other) != attn.gate(x)).any(dim=1).any(dim=0).flatten()
    assert changed.tolist() == [False, True, False, False]


def test_gates_start_at_their_initial_value() -> None:
    attn = layer(gate="linear", gate_init=0.1)
    torch.testing.assert_close(attn.gate(torch.zeros(1, 1, 32)).sigmoid(), torch.full((1, 1, 4, 1), 0.1))
    torch.testing.assert_close(layer(gate="unconditional").gate(torch.zeros(1, 1, 32)), torch.zeros(1, 1, 4, 1))


def test_wrong_arguments_are_explained() -> None:
    with pytest.raises(ValueError, match="multiple of num_heads"):
        GatedAttention(30, num_heads=4)
    with pytest.raises(ValueError, match="got 'mlp3'"):
        layer(gate="mlp3")
    with pytest.raises(ValueError, match=r"got \(0\.1, 1\.0\)"):
        layer(clip=(0.1, 1.0))
