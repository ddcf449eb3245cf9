# This repository in /mvar_jax with its environment in .venv, as launch/k8s/jobset.yaml runs it.
#   docker build -t REGISTRY/mvar_jax:latest .                                CPU
#   docker build --build-arg EXTRAS=cuda12 -t REGISTRY/mvar_jax:latest .      CUDA cards; cuda13 or tpu likewise
#   docker run -v "$PWD/runs:/mvar_jax/runs" REGISTRY/mvar_jax:latest train --config debug --workdir runs/debug
FROM python:3.12-slim
ARG EXTRAS=""
WORKDIR /mvar_jax
# a layer of its own: a change of the code does not install the requirements again
COPY requirements.txt ./
RUN python3.12 -m venv .venv && .venv/bin/python -m pip install --no-cache-dir -r requirements.txt ${EXTRAS:+"jax[$EXTRAS]"}
COPY . ./
RUN bash launch/setup.sh
ENTRYPOINT ["/mvar_jax/.venv/bin/python", "-m", "mvar_jax"]
CMD ["--help"]
