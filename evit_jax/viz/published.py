"""Published figures to compare with: top-1 on ImageNet-1k at 224 pixels, images a second and MACs.

Source: EViT (arXiv 2202.07800): fused, 300 epochs; DynamicViT fine-tuned for 30. The speed is of the authors' GPU.
"""

from evit_jax.viz.result import Result


def _series(name: str, *rows: tuple[str, float, float, float]) -> list[Result]:
    return [Result(name, label, percent / 100, round(giga * 1e9), speed) for label, percent, speed, giga in rows]


PUBLISHED = [
    *_series('EViT-DeiT-S', ('DeiT-S', 79.8, 2923, 4.6), ('0.9', 79.8, 3197, 4.0), ('0.8', 79.8, 3619, 3.5),
             ('0.7', 79.5, 4385, 3.0), ('0.6', 78.9, 4722, 2.6), ('0.5', 78.5, 5408, 2.3)),
    *_series('DynamicViT-DeiT-S', ('0.7', 79.3, 4439, 3.0), ('0.5', 77.5, 5579, 2.2)),
    *_series('EViT-LV-ViT-S', ('LV-ViT-S', 83.3, 2112, 6.6), ('0.7', 83.0, 2954, 4.7), ('0.5', 82.5, 3603, 3.9)),
]
