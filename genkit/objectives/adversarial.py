"""Reconstruction with an adversary: a network learns to tell reconstructions from images, the tokenizer to leave it no clue.

Esser et al., "Taming Transformers for High-Resolution Image Synthesis" (VQGAN), CVPR 2021, section 3.1 and eq. 6-7; hinge loss of Lim and Ye, "Geometric
GAN", 2017; LeCAM: Tseng et al., "Regularizing Generative Adversarial Networks under Limited Data", CVPR 2021, one-sided as in its code; R1: Mescheder et al.,
"Which Training Methods for GANs do actually Converge?", ICML 2018, now and then as in Karras et al., CVPR 2020. Differences: see genkit.nn.patchgan; nothing
adversarial is computed before it counts; the discriminator learns from the same reconstructions as the tokenizer, not from a second pass.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from genkit.errors import UsageError
from genkit.interfaces import Cond, Layout
from genkit.nn.global_rows import is_distributed
from genkit.nn.patchgan import PatchDiscriminator, check_sides
from genkit.nn.wrapped import unwrapped
from genkit.objectives.reconstruction import Reconstruction
from genkit.rng import Rng

_LEAST_NORM = 1e-4  # keeps the adaptive weight finite where the adversarial gradient vanishes


class Adversarial(Reconstruction):
    """As Reconstruction, and "adversarial": minus the discriminator's mean logit of the reconstruction.

    Args:
        l1, l2, commitment, perceptual, features: see Reconstruction.
        weight: of the adversarial loss.
        adaptive: scale it so that its gradient at the decoder's last layer is as long as that of the other losses of the pixels.
        most: largest such scale.
        start_step: optimiser steps before discriminator and adversarial loss begin.
        width, depth: of the discriminator, see genkit.nn.patchgan.
        lr, betas: of its Adam; the learning rate is constant.
        lecam: weight of the penalty on logits of images above the running mean of those of reconstructions, and the reverse; 0 = off. It helps where
            images are few.
        lecam_decay: share of these means kept per step.
        r1: weight gamma of gamma / 2 times the squared gradient of the logits by the pixels of images; 0 = off.
        r1_every: steps from one such penalty to the next, which counts as many times.

    Raises: UsageError for options outside their range.
    """

    def __init__(
        self,
        *,
        l1: float = 1.0,
        l2: float = 0.0,
        commitment: float = 0.25,
        perceptual: float = 1.0,
        features: str = "auto",
        weight: float = 0.8,
        adaptive: bool = True,
        most: float = 1e4,
        start_step: int = 0,
        width: int = 64,
        depth: int = 3,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.5, 0.9),
        lecam: float = 0.0,
        lecam_decay: float = 0.999,
        r1: float = 0.0,
        r1_every: int = 16,
    ):
        super().__init__(l1=l1, l2=l2, commitment=commitment, perceptual=perceptual, features=features)
        if min(width, depth, r1_every) < 1 or min(start_step, lecam, r1, weight) < 0:
            raise UsageError(
                f"objective.width={width}, depth={depth} and r1_every={r1_every} must be at least 1; "
                f"start_step={start_step}, weight={weight}, lecam={lecam} and r1={r1} at least 0"
            )
        self.weight, self.adaptive, self.most, self.start_step = weight, adaptive, most, start_step
        self.width, self.depth, self.lr, self.betas = width, depth, lr, betas
        self.lecam, self.lecam_decay, self.r1, self.r1_every = lecam, lecam_decay, r1, r1_every
        self.discriminator: Any = None
        self.optimizer: Any = None
        self.step = 0  # optimiser steps of the tokenizer
        self.means = torch.zeros(2)  # running mean logit of images, of reconstructions
        self._seen = torch.zeros(3)  # since the last step: sums of these two, and how many micro-batches

    def prepare(self, shape: tuple[int, ...], device: torch.device | str) -> None:
        """As Reconstruction, and make the discriminator, from torch's global generator. Raises UsageError for images too small for it."""
        check_sides(shape[1:], self.depth)
        # Before anything else is loaded, which may draw numbers or not: the seed alone decides where it starts.
        network = PatchDiscriminator(image_channels=shape[0], width=self.width, depth=self.depth)
        super().prepare(shape, device)
        self.discriminator = network.to(device).to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.Adam(
            self.discriminator.parameters(), lr=self.lr, betas=(self.betas[0], self.betas[1]), fused=True
        )
        self.means, self._seen = self.means.to(device), self._seen.to(device)

    def __call__(self, model: Any, target: Tensor, cond: Cond, layout: Layout | None, rng: Rng) -> dict[str, Tensor]:
        """As Reconstruction; from start_step on also "adversarial" [B], weighted.

        "_discriminator" is its loss, "_adversarial_weight" the scale, "_logit_image" and "_logit_reconstruction" are mean logits; [B] each, logged and not
        summed. The discriminator's gradients are ready when this returns; `after_step` uses them. Micro-batches change the adaptive scale alone.
        """
        reconstruction, encoded = model(target)
        losses = self.compare(reconstruction, target)
        if self.step >= self.start_step:
            if self.discriminator is None:
                self.prepare(tuple(target.shape[1:]), target.device)
            with torch.autocast(target.device.type, enabled=False):
                fake, real = reconstruction.float(), target.float()
                self.discriminator.requires_grad_(False)
                attack = -self.discriminator(fake).flatten(1).mean(1)  # [B]
                scale = self._scale(model, losses, attack) if self.adaptive else attack.new_tensor(1.0)
                found = self._judge(real, fake.detach())
            losses |= {"adversarial": self.weight * scale * attack, "_adversarial_weight": scale.expand(len(target))}
            losses |= found
        return losses | self.of_tokenizer(encoded)

    def _scale(self, model: Any, losses: dict[str, Tensor], attack: Tensor) -> Tensor:
        """|gradient of the other losses of the pixels| / |gradient of the adversarial one|, both at the last layer."""
        last = unwrapped(model).last_layer
        pixels = torch.stack([value.mean() for name, value in losses.items() if name[0] != "_"]).sum()
        norms = []
        for loss in (pixels, attack.mean()):
            (gradient,) = torch.autograd.grad(loss, last, retain_graph=True)
            gradient = gradient.float().contiguous()
            if is_distributed():  # of the whole batch, so that the number of processes changes nothing
                dist.all_reduce(gradient)
            norms.append(torch.linalg.vector_norm(gradient))
        return (norms[0] / (norms[1] + _LEAST_NORM)).clamp(0, self.most).detach()

    def _judge(self, real: Tensor, fake: Tensor) -> dict[str, Tensor]:
        """Add the discriminator's gradients on one micro-batch; what to log of it, [B] each."""
        self.discriminator.requires_grad_(True)
        needs_pixels = self.r1 > 0 and (self.step - self.start_step) % self.r1_every == 0
        real = real.detach().requires_grad_(needs_pixels)
        with torch.enable_grad():
            of_real, of_fake = self.discriminator(real), self.discriminator(fake)
            loss = hinge(of_real, of_fake)  # [B]
            total = loss.mean()
            if self.lecam and self.step > self.start_step:  # before, there are no means yet
                total = total + self.lecam * lecam(of_real, of_fake, *self.means)
            if needs_pixels:
                total = total + self.r1_every * self.r1 / 2 * gradient_penalty(of_real, real)
            total.backward()
        means = torch.stack([of_real.detach().mean(), of_fake.detach().mean()])
        self._seen += torch.cat([means, means.new_ones(1)])
        names = ("_logit_image", "_logit_reconstruction")
        return {"_discriminator": loss.detach()} | {
            name: mean.expand(len(real)) for name, mean in zip(names, means, strict=True)
        }

    @torch.no_grad()
    def after_step(self) -> None:
        """One step of the discriminator from all micro-batches and processes since the last. A gradient that is not finite is dropped.

        Every process must call it after the same optimiser steps.
        """
        self.step += 1
        if self.discriminator is None or self.step <= self.start_step:
            return
        gradients = [p.grad for p in self.discriminator.parameters() if p.grad is not None]
        if not gradients:
            return
        if is_distributed():
            dist.all_reduce(self._seen)
            for gradient in gradients:
                dist.all_reduce(gradient)
        torch._foreach_div_(gradients, self._seen[2])
        seen = self._seen[:2] / self._seen[2]
        is_first = self.step == self.start_step + 1
        if bool(torch.stack(torch._foreach_norm(gradients)).sum().isfinite()):
            self.optimizer.step()
            self.means = seen if is_first else self.means.lerp(seen, 1 - self.lecam_decay)
        self.optimizer.zero_grad(set_to_none=True)
        self._seen.zero_()

    def state(self) -> dict[str, Tensor]:
        """Everything that has to be saved to continue, name -> tensor."""
        found = {f"discriminator.{name}": value for name, value in self.discriminator.state_dict().items()}
        for index, values in self.optimizer.state_dict()["state"].items():
            found |= {f"optimizer.{index}.{name}": value for name, value in values.items()}
        return found | {"means": self.means, "step": torch.tensor(self.step)}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from what `state` returned; after `prepare`."""
        own = {name.partition(".")[2]: value for name, value in state.items() if name.startswith("discriminator.")}
        self.discriminator.load_state_dict(own)
        moments: dict[int, dict[str, Tensor]] = {}
        parameters = list(self.discriminator.parameters())
        for name, value in state.items():
            part, _, rest = name.partition(".")
            if part == "optimizer":
                index, _, word = rest.partition(".")
                like = parameters[int(index)]
                if value.shape == like.shape:
                    # The fused kernel walks parameter and moments as flat memory: both must have the same strides.
                    value = torch.empty_like(like).copy_(value)
                moments.setdefault(int(index), {})[word] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        self.means.copy_(state["means"])
        self.step = int(state["step"])


def hinge(of_real: Tensor, of_fake: Tensor) -> Tensor:
    """Logits [B, ...] of images and of reconstructions -> the discriminator's loss [B]: half the distances by which they miss 1 and -1."""
    return 0.5 * (F.relu(1 - of_real).flatten(1).mean(1) + F.relu(1 + of_fake).flatten(1).mean(1))


def lecam(of_real: Tensor, of_fake: Tensor, mean_real: Tensor, mean_fake: Tensor) -> Tensor:
    """[]: mean squares by which logits of images exceed the running mean of reconstructions, and by which those of reconstructions lie below that of images."""
    return F.relu(of_real - mean_fake).square().mean() + F.relu(mean_real - of_fake).square().mean()


def gradient_penalty(logits: Tensor, x: Tensor) -> Tensor:
    """[]: squared length of the gradient of an image's summed logits by its pixels, mean over images."""
    (gradient,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
    return gradient.square().flatten(1).sum(1).mean()
