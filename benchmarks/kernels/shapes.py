"""The cases of the kernel benchmarks: the shapes of HRNet-W18 and W48 at 512x1024 crops and of pyramid pooling, and odd ones.

``QUICK`` has every operator at least once, small shapes and one large one; ``CASES`` has those and all others.
"""

from dataclasses import replace

from .cases import (
    Case,
    affine,
    channel_statistics,
    class_map,
    cross_entropy,
    norm_sum,
    projection,
    pyramid,
    split,
    supervised,
    training,
    transfer,
)


def three_images(case: Case) -> Case:
    return replace(case, images=3)


QUICK = [
    transfer("up2 96 -> 48, 64x128", 96, 48, (64, 128), (128, 256)),
    transfer("up8 384 -> 48, 16x32", 384, 48, (16, 32), (128, 256)),
    transfer("down2 48 -> 96, 128x256", 48, 96, (128, 256), (64, 128)),
    transfer("same size, 48, 128x256", 48, None, (128, 256), (128, 256)),
    three_images(transfer("up 130 -> 36, 33x65 to 65x129", 130, 36, (33, 65), (65, 129))),
    supervised("down4 144 -> 192, 19 classes, 128x256", 144, 192, 19, (128, 256), (32, 64)),
    class_map("144 -> 19, 128x256", 144, 19, (128, 256)),
    projection("96 -> 48, 64x128", 96, 48, (64, 128)),
    affine("up2 48, 64x128", 48, (64, 128), (128, 256)),
    training("up2 96 -> 48, 64x128", 96, 48, (64, 128), (128, 256)),
    pyramid("ResNet-50, 2048, 64x128", 2048, (64, 128)),
    cross_entropy("19 classes, 128x256 -> 512x1024", 19, (128, 256), (512, 1024)),
    channel_statistics("48, 128x256", 48, (128, 256)),
    norm_sum("norm + x, 48, 128x256", 48, (128, 256), [(128, 256)], residual=True),
    norm_sum("fusion of 4, 48, 128x256", 48, (128, 256), [(64, 128), (32, 64), (16, 32)], residual=True),
    split("branch 1 of 4, 96, 64x128", 96, (64, 128), [48], 3),
]

CASES = [
    *QUICK,
    # The gated fusion module's transfers between branches (batch norm folded).
    transfer("up4 192 -> 48, 32x64", 192, 48, (32, 64), (128, 256)),
    transfer("up2 384 -> 192, 16x32", 384, 192, (16, 32), (32, 64)),
    transfer("up2 36 -> 18, 64x128", 36, 18, (64, 128), (128, 256)),
    transfer("up4 72 -> 18, 32x64", 72, 18, (32, 64), (128, 256)),
    transfer("up8 144 -> 18, 16x32", 144, 18, (16, 32), (128, 256)),
    transfer("same size, 384, 16x32", 384, None, (16, 32), (16, 32)),
    transfer("same size, 18, 128x256", 18, None, (128, 256), (128, 256)),
    # The paper-literal gated transition: from the concatenated branches to a new one, and pooling as such.
    transfer("down4 144 -> 192, 128x256", 144, 192, (128, 256), (32, 64), relu=True),
    transfer("down4 54 -> 72, 128x256", 54, 72, (128, 256), (32, 64), relu=True),
    transfer("up2 96 -> 48, 64x128", 96, 48, (64, 128), (128, 256), relu=True),
    transfer("down4 48 -> 192, 128x256", 48, 192, (128, 256), (32, 64)),
    transfer("down2 18 -> 36, 128x256", 18, 36, (128, 256), (64, 128)),
    supervised("down4 54 -> 72, 19 classes, 128x256", 54, 72, 19, (128, 256), (32, 64)),
    class_map("54 -> 19, 128x256", 54, 19, (128, 256)),
    # Maps of hundreds of megabytes in a batch of 8.
    transfer("up2 96 -> 48, 256x512", 96, 48, (256, 512), (512, 1024)),
    transfer("down2 48 -> 96, 512x1024", 48, 96, (512, 1024), (256, 512)),
    transfer("up4 192 -> 48, 128x256", 192, 48, (128, 256), (512, 1024)),
    # The fusion's projections in training.
    projection("384 -> 48, 16x32", 384, 48, (16, 32)),
    projection("36 -> 18, 64x128", 36, 18, (64, 128)),
    projection("144 -> 192, 128x256", 144, 192, (128, 256)),
    affine("up8 48, 16x32", 48, (16, 32), (128, 256)),
    affine("up2 18, 64x128", 18, (64, 128), (128, 256)),
    affine("down4 192, 128x256", 192, (128, 256), (32, 64), relu=True),
    affine("same size, 48, 128x256", 48, (128, 256), (128, 256), relu=True),
    training("up8 384 -> 48, 16x32", 384, 48, (16, 32), (128, 256)),
    training("up2 36 -> 18, 64x128", 36, 18, (64, 128), (128, 256)),
    training("down4 144 -> 192, 128x256", 144, 192, (128, 256), (32, 64), relu=True),
    pyramid("W48, 720, 128x256", 720, (128, 256)),
    pyramid("W18, 270, 128x256", 270, (128, 256)),
    pyramid("bin 6, 2048, 64x128", 2048, (64, 128), (6,)),
    # The loss of one head.
    cross_entropy("60 classes, 120x120 -> 480x480", 60, (120, 120), (480, 480)),
    # The ends of residual blocks and of the gated fusion modules in training, and what leaves their branches.
    channel_statistics("18, 128x256", 18, (128, 256)),
    channel_statistics("384, 16x32", 384, (16, 32)),
    norm_sum("norm, 48, 128x256", 48, (128, 256), [(128, 256)]),
    norm_sum("norm, 18, 128x256", 18, (128, 256), [(128, 256)]),
    norm_sum("norm + x, 384, 16x32", 384, (16, 32), [(16, 32)], residual=True),
    norm_sum("fusion of 4, 18, 128x256", 18, (128, 256), [(64, 128), (32, 64), (16, 32)], residual=True),
    norm_sum("fusion of 4, 192, 32x64", 192, (32, 64), [(32, 64), (32, 64), (16, 32)], residual=True),
    split("branch 0 of 4, 48, 128x256", 48, (128, 256), [], 4),
    split("branch 3 of 4, 384, 16x32", 384, (16, 32), [48, 96, 192], 1),
    split("branch 1 of 4, 36, 64x128", 36, (64, 128), [18], 3),
    # Odd sizes, channels that no vector divides, maps of one pixel.
    *map(
        three_images,
        [
            transfer("down 18 -> 130, 127x255 to 64x128", 18, 130, (127, 255), (64, 128)),
            transfer("up 130 -> 36, 1x1 to 33x65", 130, 36, (1, 1), (33, 65)),
            supervised("down 130 -> 36, 7 classes, 65x129 to 33x65", 130, 36, 7, (65, 129), (33, 65)),
            class_map("130 -> 7, 65x129", 130, 7, (65, 129)),
            projection("130 -> 18, 33x65", 130, 18, (33, 65)),
            affine("up 130, 33x65 to 65x129", 130, (33, 65), (65, 129)),
            affine("up 130, 1x1 to 33x65", 130, (1, 1), (33, 65), relu=True),
            training("up 130 -> 18, 33x65 to 65x129", 130, 18, (33, 65), (65, 129)),
            pyramid("130, 61x33", 130, (61, 33)),
            cross_entropy("7 classes, 31x33 -> 121x129", 7, (31, 33), (121, 129)),
            channel_statistics("130, 33x65", 130, (33, 65)),
            norm_sum("norm + x, 130, 65x129", 130, (65, 129), [(65, 129)], residual=True),
            norm_sum("fusion of 3, 36, 65x129", 36, (65, 129), [(33, 65), (1, 1)], residual=True),
            split("130, 33x65", 130, (33, 65), [18, 36], 2),
        ],
    ),
]
CASES.sort(key=lambda case: case.operator)  # stable
