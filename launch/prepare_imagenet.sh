#!/usr/bin/env bash
# ImageNet (ILSVRC2012) as ArrayRecord by TensorFlow Datasets, once. No accelerator is needed, nor is anything trained.
#   bash launch/prepare_imagenet.sh TARS [DATA]
# TARS holds ILSVRC2012_img_train.tar (138 GB) and ILSVRC2012_img_val.tar (6.3 GB), from https://image-net.org
# after registration. DATA (default ~/tensorflow_datasets) gets the records: about 145 GB more; with TFDS's own
# temporary copy have 300 GB free. TFDS reads the tars as they are, nothing is unpacked beside them. Expect hours:
# the time is that of reading and writing 145 GB once and of 1.3 million small records; not measured here.
# The tars may be deleted afterwards, and so may the records once cache_tokens has run (about 3.6 GB are left).
# Started again after an interruption it begins anew; where the data are prepared it does nothing.
set -euo pipefail
TARS=${1:?usage: bash launch/prepare_imagenet.sh TARS [DATA]}
DATA=${2:-$HOME/tensorflow_datasets}
cd "$(dirname "$0")/.."
for name in train val; do
  [ -f "$TARS/ILSVRC2012_img_$name.tar" ] || {
    echo "error: $TARS/ILSVRC2012_img_$name.tar: expected the file that image-net.org hands out" >&2
    exit 2
  }
done
.venv/bin/python - "$(realpath "$TARS")" "$DATA" <<'PYTHON'
import sys

import tensorflow_datasets as tfds

tars, data = sys.argv[1:]
builder = tfds.builder("imagenet2012", data_dir=data, file_format="array_record")
builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=tars))
for name, split in builder.info.splits.items():
    print(f"{name}: {split.num_examples} images, {split.num_bytes / 1e9:.1f} GB in {builder.data_dir}")
PYTHON
echo "Look at it:  python -m mvar_jax data --config configs/folder.py --config.data.source=tfds \\"
echo "                 --config.data.name=imagenet2012 --config.data.path=$DATA --out runs/imagenet/look"
