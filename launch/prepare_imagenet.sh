#!/usr/bin/env bash
# Prepare ImageNet (ILSVRC2012) as ArrayRecord by TensorFlow Datasets, once. Needs no accelerator.
#   bash launch/prepare_imagenet.sh TARS [DATA]
# TARS holds ILSVRC2012_img_train.tar (138 GB) and ILSVRC2012_img_val.tar (6.3 GB), from https://image-net.org
# after registration. DATA (default ~/tensorflow_datasets) gets about 145 GB of records; have 300 GB free for TFDS's
# temporary copy. TFDS reads the tars as they are and unpacks nothing. Expect hours: it reads and writes 145 GB once, as
# 1.3 million small records; not measured here.
# The tars may be deleted afterwards, and the records too once cache_tokens has run (its cache takes about 3.6 GB).
# Not resumable: after an interruption it starts over. If the data are prepared, it does nothing.
set -euo pipefail
if [ $# -lt 1 ]; then
  echo "error: TARS is required: bash launch/prepare_imagenet.sh TARS [DATA]" >&2
  exit 2
fi
TARS=$(realpath -m "$1")
DATA=$(realpath -m "${2:-$HOME/tensorflow_datasets}")
cd "$(dirname "$0")/.."
source launch/environment.sh
need_environment
for name in train val; do
  [ -f "$TARS/ILSVRC2012_img_$name.tar" ] || {
    echo "error: $TARS/ILSVRC2012_img_$name.tar is missing; download it from https://image-net.org" >&2
    exit 2
  }
done
.venv/bin/python - "$TARS" "$DATA" <<'PYTHON'
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
