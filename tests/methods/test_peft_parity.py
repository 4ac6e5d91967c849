"""Mask for mask against PEFT's RankAllocator, from the same initial values, in the authors' order of operations."""

import torch

from adalora_dist.config.methods import method_config
from adalora_dist.methods.hooks import attach
from adalora_dist.methods.inject import adapt
from tests.support.models import Net, global_batch

STEPS, T_I, T_F, INTERVAL = 90, 10, 20, 4
RANK, TARGET, GAMMA, ALPHA = 4, 2, 0.1, 8.0
SIZES = dict(d=7, hidden=13, num_blocks=3)


def test_the_same_triplets_are_masked_over_a_whole_run():
    from peft import AdaLoraConfig, get_peft_model

    torch.manual_seed(0)
    peft_base = Net(**SIZES)
    own = Net(**SIZES)
    own.load_state_dict(peft_base.state_dict())
    theirs = get_peft_model(
        peft_base,
        AdaLoraConfig(
            init_r=RANK, target_r=TARGET, tinit=T_I, tfinal=T_F, deltaT=INTERVAL, beta1=0.85, beta2=0.85,
            orth_reg_weight=GAMMA, total_step=STEPS, lora_alpha=ALPHA, target_modules=["up", "down"],
        ),
    )  # fmt: skip
    settings = method_config(
        init_rank=RANK, target_rank=TARGET, alpha=ALPHA, targets=("up", "down"), initial_warmup_steps=T_I,
        final_steps=T_F, mask_interval_steps=INTERVAL, orthogonality=GAMMA, importance_order="after",
        start="paper",
    )  # fmt: skip
    matrices = adapt(own, settings)
    peft_layers = {n.removeprefix("base_model.model."): m for n, m in theirs.named_modules() if hasattr(m, "lora_E")}
    with torch.no_grad():
        for matrix in matrices:
            layer, peft_layer = matrix, peft_layers[matrix.name]
            for values in (peft_layer.lora_A, peft_layer.lora_B, peft_layer.lora_E):
                values["default"].mul_(20)  # near unit length, so that signals and patterns move
            layer.P.copy_(peft_layer.lora_B["default"])
            layer.Qt.copy_(peft_layer.lora_A["default"].T)
            layer.lam.copy_(peft_layer.lora_E["default"].flatten())
            layer.scale = ALPHA / (RANK + 1e-5)  # PEFT's scale
        own.adalora.index()

    own_optimizer = torch.optim.AdamW([p for p in own.parameters() if p.requires_grad], lr=1e-2)
    peft_optimizer = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=1e-2)
    hooks = attach(own, own_optimizer, settings, STEPS)
    allocator = hooks.method_step
    peft_allocator = theirs.base_model.rankallocator
    peft_pattern = None
    num_compared, patterns = 0, set()
    vectors_at_freeze = []
    for step in range(STEPS):
        x, y = global_batch(step)
        (own(x) - y).square().mean().backward()
        own_optimizer.step()
        own_optimizer.zero_grad()

        # PEFT adds the regulariser inside a forward that computes its own loss; the loss here is ours, so the same
        # term is added by hand, as PEFT does it.
        loss = (theirs(x) - y).square().mean()
        factors = [p for n, p in theirs.named_parameters() if "lora_A" in n or "lora_B" in n]
        covariances = [
            p @ p.T if "lora_A" in n else p.T @ p
            for n, p in theirs.named_parameters()
            if p.requires_grad and "lora_E" not in n
        ]  # noqa: E501
        loss = loss + GAMMA * sum(torch.norm(c - torch.eye(RANK), p="fro") for c in covariances) / len(factors)
        loss.backward()
        peft_optimizer.step()
        if step < STEPS - T_F:
            _, pattern = peft_allocator.update_and_allocate(theirs, step)
        elif step == STEPS - T_F:
            _, pattern = peft_allocator.update_and_allocate(theirs, step, force_mask=True)
        else:
            peft_allocator.mask_using_rank_pattern(theirs, peft_pattern)
            pattern = None
        peft_optimizer.zero_grad()
        if pattern is not None:
            peft_pattern = pattern
        if allocator.allocations and allocator.allocations[-1].step == step or step > STEPS - T_F:
            assert peft_pattern is not None
            for matrix in matrices:
                masked = peft_layers[matrix.name].lora_E["default"].flatten() == 0
                assert torch.equal(matrix.lam == 0, masked), f"step {step}, {matrix.name}"
            if step == STEPS - T_F:
                # Later PEFT's regulariser goes on pulling at pruned vectors, and through them at the others; here
                # they are out of the run.
                for matrix in matrices:
                    kept = matrix.lam != 0
                    theirs_kept = peft_layers[matrix.name].lora_B["default"].detach()[:, kept].clone()
                    vectors_at_freeze.append((matrix.P.detach()[:, kept].clone(), theirs_kept))
            num_compared += 1
            patterns.add(tuple(allocator.keep.tolist()))
    hooks.finish()
    assert num_compared >= 30 and len(patterns) >= 6, (num_compared, len(patterns))
    assert len(vectors_at_freeze) == len(matrices)
    for own_vectors, peft_vectors in vectors_at_freeze:
        torch.testing.assert_close(own_vectors, peft_vectors, rtol=1e-4, atol=1e-5)
