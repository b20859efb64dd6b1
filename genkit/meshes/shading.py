"""Grey pictures of what a camera sees: one way to look good, one to measure by."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, normalize

from genkit.meshes.mesh import Mesh
from genkit.meshes.render import Camera, Seen, rasterise

# Twenty corners of a dodecahedron, in a fixed order: views of two sets of shapes are compared by number.
VIEWS = [
    *((0.52573, s * 0.38197, 0.85065) for s in (1, -1)),
    *((-0.20081, s * 0.61803, 0.85065) for s in (1, -1)),
    (-0.64984, 0.0, 0.85065),
    *((0.85065, s * 0.61803, 0.20081) for s in (1, -1)),
    *((-0.32492, s * 1.0, 0.20081) for s in (1, -1)),
    (-1.0515, 0.0, 0.20081),
    (1.0515, 0.0, -0.20081),
    *((0.32492, s * 1.0, -0.20081) for s in (1, -1)),
    *((-0.85065, s * 0.61803, -0.20081) for s in (1, -1)),
    (0.64984, 0.0, -0.85065),
    *((0.20081, s * 0.61803, -0.85065) for s in (1, -1)),
    *((-0.52573, s * 0.38197, -0.85065) for s in (1, -1)),
]
_COLOUR, _METALLIC, _ROUGHNESS = 0.3, 0.2, 0.8


def view(number: int) -> Camera:
    """One of the 20 cameras of shading-image distances (Zheng et al. 2022, "SDF-StyleGAN", section 5): 2.141 from the origin, 60 degrees."""
    return Camera(torch.tensor(VIEWS[number]) * 2, 60.0)


def shaded(mesh: Mesh, camera: Camera, size: int) -> Tensor:
    """The picture that shading-image distances are measured on: flat faces, white background, three white lights at the camera.

    Microfacet shading (metallic 0.2, roughness 0.8, grey 0.3) of a directional light of 3, a point light of 6 and a spot light of 3 between pi/16 and pi/6,
    as in the public renderings of SDF-StyleGAN. A face that looks away from the camera is not turned round: it comes out dark.

    Returns: [size, size] in [0, 1], gamma 2.2.
    """
    seen = rasterise(mesh, camera, size)
    normal = mesh.normals[seen.face.clamp_min(0)]
    # Where the pixel's ray meets the plane of its face.
    where = seen.blend(mesh.vertices, mesh.faces)
    to_eye = camera.eye - where
    distance = to_eye.norm(dim=-1).clamp_min(1e-6)  # [Y, X]
    v = to_eye / distance[..., None]
    axis = normalize(camera.eye, dim=0)
    diffuse = _COLOUR * 0.96 * (1 - _METALLIC)
    f0 = 0.04 * (1 - _METALLIC) + _COLOUR * _METALLIC
    inner, outer = math.cos(math.pi / 16), math.cos(math.pi / 6)
    spot = (((v * axis).sum(-1) - outer) / (inner - outer)).clamp(0, 1) ** 2
    colour = torch.zeros_like(distance)
    n_v = (normal * v).sum(-1).abs().clamp(0.001, 1)
    for light, radiance in ((axis.expand_as(v), 3.0), (v, 6 / distance**2), (v, 3 * spot / distance**2)):
        half = normalize(light + v, dim=-1)
        n_l = (normal * light).sum(-1).clamp(0.001, 1)
        n_h, v_h = (normal * half).sum(-1).clamp(0, 1), (v * half).sum(-1).clamp(0, 1)
        fresnel = f0 + (1 - f0) * (1 - v_h) ** 5
        k = (_ROUGHNESS + 1) ** 2 / 8
        shadowing = (n_v / (n_v * (1 - k) + k)) * (n_l / (n_l * (1 - k) + k))
        a = _ROUGHNESS**2
        spread = a**2 / (math.pi * (n_h**2 * (a**2 - 1) + 1) ** 2)
        glossy = fresnel * shadowing * spread / (4 * n_l * n_v + 0.001)
        colour = colour + n_l * radiance * ((1 - fresnel) * diffuse / math.pi + glossy)
    grey = colour.clamp(0, 1) ** (1 / 2.2)
    return torch.where(seen.hit, grey, 1.0)


def portrait(
    mesh: Mesh,
    camera: Camera,
    size: int,
    colour: tuple[float, float, float] = (0.62, 0.67, 0.74),
    background: float = 1.0,
    smooth: float = 40.0,
) -> Tensor:
    """A picture to look at: soft light from above and from the left of the camera, edges kept sharp, four samples per pixel.

    Args:
        colour: of the surface, RGB in [0, 1].
        smooth: degrees; over edges that are flatter, normals are blended.

    Returns: [3, size, size] in [-1, 1].
    """
    seen = rasterise(mesh, camera, size * 2)
    normal = soft_normals(mesh, seen, smooth)
    facing = (normal * seen.rays).sum(-1, keepdim=True)
    normal = torch.where(facing > 0, -normal, normal)  # both sides are lit alike
    right, up, back = camera.axes
    key = normalize(0.9 * up - 0.55 * right + 0.8 * back, dim=0)
    fill = normalize(0.7 * right + 0.1 * up + 0.6 * back, dim=0)
    sky = 0.5 + 0.5 * normal[..., 1]
    half = normalize(key - seen.rays, dim=-1)
    light = 0.2 + 0.26 * sky + 0.52 * (normal @ key).clamp_min(0) + 0.14 * (normal @ fill).clamp_min(0)
    gloss = 0.12 * (normal * half).sum(-1).clamp_min(0) ** 24
    picture = (torch.tensor(colour)[:, None, None] * light + gloss).clamp(0, 1)
    picture = torch.where(seen.hit, picture, background)
    return avg_pool2d(picture[None], 2)[0] * 2 - 1


def soft_normals(mesh: Mesh, seen: Seen, degrees: float) -> Tensor:
    """[Y, X, 3] of length 1: blended from the corners where these look much the same way as the face, else the face's own."""
    face = mesh.normals[seen.face.clamp_min(0)]
    corners = mesh.vertex_normals[mesh.faces[seen.face.clamp_min(0)]]  # [Y, X, 3, 3]
    agree = (corners * face[:, :, None]).sum(-1, keepdim=True) > math.cos(math.radians(degrees))
    blended = (torch.where(agree, corners, face[:, :, None]) * seen.weights[..., None]).sum(2)
    return normalize(blended, dim=-1)
