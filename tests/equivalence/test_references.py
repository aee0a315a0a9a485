"""The Mamba blocks against independent implementations, with weights copied over."""

import mamba_references as references
import pytest
import torch
from model_cases import assert_close, outputs_and_gradients

from vaemo.model.mamba import Mamba
from vaemo.model.mamba2 import Mamba2, ssd_chunk, ssd_kernel, ssd_reference
from vaemo.model.scan import BLOCK_STEPS, scan_chunk, scan_compiled, scan_kernel, scan_reference, scan_step

OUTPUT, GRADIENT = 1e-5, 1e-4
"""float32: sums of some hundred terms in another order; gradients add up over lanes and steps."""

L, T, E, N, G, P = 3, 21, 8, 5, 4, 6


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def scan_inputs():
    """x, delta, A, B, C, h of the Mamba-1 scan, float64, with gradients; the last steps of one lane are padding."""
    delta = torch.rand(L, T, E, dtype=torch.float64)
    delta[1, 15:] = 0
    inputs = (randn(L, T, E), delta, -torch.rand(N, E, dtype=torch.float64), randn(L, T, N), randn(L, T, N))
    return [x.requires_grad_() for x in (*inputs, randn(L, N, E))]


def ssd_inputs(steps=T):
    delta = torch.rand(L, steps, G, dtype=torch.float64)
    delta[1, steps // 2 :] = 0
    inputs = (randn(L, steps, G, P), delta, -torch.rand(G, dtype=torch.float64), randn(L, steps, N), randn(L, steps, N))
    return [x.requires_grad_() for x in (*inputs, randn(L, G, P, N))]


def assert_as(specification, scan, inputs):
    """A scan has the outputs and gradients of another, and without gradients the same outputs."""
    expected = outputs_and_gradients(specification, inputs)
    for found, other in zip(outputs_and_gradients(scan, inputs), expected, strict=True):
        assert_close(found, other)
    with torch.no_grad():
        for found, other in zip(scan(*inputs), expected, strict=False):
            assert_close(found, other)


def by_selective_scan_ref(x, delta, A, B, C):
    """The scan from zero by mamba-ssm's reference."""
    channels_first = [tensor.transpose(1, 2) for tensor in (x, delta, B, C)]
    y, h = references.interface.selective_scan_ref(
        channels_first[0], channels_first[1], A.t(), *channels_first[2:], return_last_state=True
    )
    return y.transpose(1, 2), h.transpose(1, 2)


@pytest.mark.parametrize("scan", [scan_reference, scan_chunk, scan_compiled])
def test_the_scan_is_selective_scan_ref(scan):
    # The reference computes in float32 whatever it is given.
    *inputs, h = (x.detach().float().requires_grad_() for x in scan_inputs())
    expected = outputs_and_gradients(by_selective_scan_ref, inputs)
    found = outputs_and_gradients(lambda *x: scan(*x, torch.zeros_like(h)), inputs)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=GRADIENT, atol=OUTPUT)


def scan_by_steps(x, delta, A, B, C, h):
    outputs = []
    for t in range(T):
        y, h = scan_step(x[:, t], delta[:, t], A, B[:, t], C[:, t], h)
        outputs.append(y)
    return torch.stack(outputs, 1), h


@pytest.mark.parametrize("scan", [scan_chunk, scan_compiled, scan_by_steps])
def test_the_fast_scans_are_their_specification(scan):
    assert T > 2 * BLOCK_STEPS
    assert T % BLOCK_STEPS
    assert_as(scan_reference, scan, scan_inputs())


@pytest.mark.parametrize("scan", [scan_chunk, scan_compiled])
@pytest.mark.parametrize("steps", [1, BLOCK_STEPS + 1])
def test_the_fast_scans_have_the_gradients_of_their_outputs(scan, steps):
    small = [x[:2, :steps] if x.dim() == 3 and x.shape[1] == T else x for x in scan_inputs()]
    small = [x.detach()[: 2 if x.dim() == 3 else None].clone().requires_grad_() for x in small]
    assert torch.autograd.gradcheck(scan, small)


@pytest.mark.parametrize("steps", [1, 21, 64, 65, 130])
def test_the_matrix_form_of_mamba2_is_its_specification(steps):
    assert_as(ssd_reference, ssd_chunk, ssd_inputs(steps))


def ssd_by_mamba_ssm(x, delta, A, B, C, h):
    """Mamba-2's scan by mamba-ssm's page of plain PyTorch."""
    per_head = [tensor[:, :, None].expand(-1, -1, G, -1) for tensor in (B, C)]
    return references.ssd_minimal.ssd_minimal_discrete(
        x * delta[..., None], delta * A, *per_head, block_len=7, initial_states=h[:, None]
    )


@pytest.mark.parametrize("scan", [ssd_reference, ssd_chunk])
def test_the_scan_of_mamba2_is_ssd_minimal(scan):
    assert_as(ssd_by_mamba_ssm, scan, ssd_inputs())


def kernel_from_zero(u, delta, A, B, C, return_last_state):
    """What the CUDA kernel of Mamba-1 offers: zero initial state, and no gradient for the final one."""
    assert return_last_state
    inputs = [u, delta, B, C]
    x, delta, B, C = (tensor.transpose(1, 2) for tensor in inputs)
    y, h = scan_reference(x, delta, A.t(), B, C, u.new_zeros(L, N, E))
    return y.transpose(1, 2), h.transpose(1, 2).detach()


def test_the_kernel_form_adds_initial_state_and_gradients_to_a_kernel_without(monkeypatch):
    monkeypatch.setattr(references.interface, "selective_scan_fn", kernel_from_zero)
    assert_as(scan_reference, scan_kernel, scan_inputs())


def test_the_kernel_form_of_mamba2_passes_states_on(monkeypatch):
    def combined(x, dt, A, B, C, chunk_size, initial_states, return_final_states):
        assert return_final_states
        return ssd_by_mamba_ssm(x, dt, A, B[:, :, 0], C[:, :, 0], initial_states)

    monkeypatch.setattr(references.ssd_combined, "mamba_chunk_scan_combined", combined)
    assert_as(ssd_reference, ssd_kernel, ssd_inputs())


BLOCKS = {
    "mamba": (lambda **kw: Mamba(16, 5, **kw), lambda: references.hf_mamba_mixer(16, 5)),
    "mamba2": (lambda **kw: Mamba2(16, 5, headdim=4, **kw), lambda: references.hf_mamba2_mixer(16, 5, 4)),
}


def zero_memory(block):
    return tuple(torch.zeros(L, *shape) for shape in block.memory_shapes().values())


def perturbed(block):
    """Random values for what starts as a constant."""
    with torch.no_grad():
        for parameter in block.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return block


FORMS = [("mamba", "compiled"), *((kind, scan) for kind in BLOCKS for scan in ("reference", "chunk"))]


@pytest.mark.parametrize(("kind", "scan"), FORMS)
def test_a_block_is_the_one_of_transformers(kind, scan):
    ours, theirs = BLOCKS[kind][0](scan=scan), perturbed(BLOCKS[kind][1]())
    ours.load_state_dict(theirs.state_dict())
    valid = torch.ones(L, T, dtype=torch.bool)
    x = torch.randn(L, T, 16)
    results = []
    for run in (lambda x: ours(x, zero_memory(ours), valid, ours.constants())[0], theirs):
        leaf = x.clone().requires_grad_()
        y = run(leaf)
        block = theirs if run is theirs else ours
        names = [name for name, _ in block.named_parameters()]
        grads = torch.autograd.grad((y * torch.linspace(-1, 1, 16)).sum(), [leaf, *block.parameters()])
        results.append((y, dict(zip(["x", *names], grads, strict=True))))
    (found, found_grads), (expected, expected_grads) = results
    torch.testing.assert_close(found, expected, rtol=OUTPUT, atol=OUTPUT)
    for name, grad in expected_grads.items():
        scale = float(grad.abs().max())
        torch.testing.assert_close(found_grads[name], grad, rtol=GRADIENT, atol=GRADIENT * scale)


@pytest.mark.parametrize("kind", BLOCKS)
def test_a_block_continues_where_the_one_of_transformers_runs_through(kind):
    ours, theirs = BLOCKS[kind][0](), perturbed(BLOCKS[kind][1]())
    ours.load_state_dict(theirs.state_dict())
    x, constants = torch.randn(L, T, 16), ours.constants()
    with torch.no_grad():
        memory, outputs = zero_memory(ours), []
        for part in x.split([1, 2, 9, 9], 1):
            y, memory = ours(part, memory, torch.ones(part.shape[:2], dtype=torch.bool), constants)
            outputs.append(y)
        torch.testing.assert_close(torch.cat(outputs, 1), theirs(x), rtol=OUTPUT, atol=OUTPUT)


def test_state_dicts_are_those_of_mamba_ssm():
    pairs = [
        (Mamba(16, 5), references.mamba_simple.Mamba(16, d_state=5, use_fast_path=False)),
        (
            Mamba2(16, 5, headdim=4),
            references.mamba2_module.Mamba2(16, d_state=5, headdim=4, use_mem_eff_path=False),
        ),
    ]
    for ours, theirs in pairs:
        ours.load_state_dict(theirs.state_dict(), strict=True)
        theirs.load_state_dict(ours.state_dict(), strict=True)


def test_a_mamba_block_is_the_one_of_mamba_ssm(monkeypatch):
    monkeypatch.setattr(references.mamba_simple, "selective_scan_fn", references.interface.selective_scan_ref)
    theirs = perturbed(references.mamba_simple.Mamba(16, d_state=5, use_fast_path=False))
    ours = Mamba(16, 5)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(L, T, 16)
    y, _ = ours(x, zero_memory(ours), torch.ones(L, T, dtype=torch.bool), ours.constants())
    torch.testing.assert_close(y, theirs(x), rtol=OUTPUT, atol=OUTPUT)


def test_initial_step_sizes_and_rates_are_distributed_as_in_mamba_ssm():
    """Over many channels: delta log-uniform in [1e-3, 0.1]; A of Mamba-1 equal, of Mamba-2 in [1, 16]."""
    ours, theirs = Mamba(512), references.mamba_simple.Mamba(512, use_fast_path=False)
    assert torch.equal(ours.A_log, theirs.A_log)
    assert torch.equal(ours.D, theirs.D)
    second, other = Mamba2(512, headdim=1), references.mamba2_module.Mamba2(512, headdim=1, use_mem_eff_path=False)
    for bias, reference in ((ours.dt_proj.bias, theirs.dt_proj.bias), (second.dt_bias, other.dt_bias)):
        delta, expected = (torch.nn.functional.softplus(tensor.detach()).log() for tensor in (bias, reference))
        assert abs(delta.mean() - expected.mean()) < 5 * expected.std() / len(expected) ** 0.5
        assert delta.exp().min() > 0.00099
        assert delta.exp().max() < 0.1001
    for rates in (second.A_log.exp(), other.A_log.exp()):
        assert rates.min() >= 1
        assert rates.max() <= 16
        assert abs(rates.mean() - 8.5) < 5 * rates.std() / len(rates) ** 0.5
    bound = ours.dt_rank**-0.5
    assert ours.dt_proj.weight.abs().max() <= bound
    assert abs(ours.dt_proj.weight.std() - bound / 3**0.5) < 0.05 * bound
