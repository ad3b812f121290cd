# An image with the command dsv3.
#
#   docker build -t dsv3-jax .                                                      for CPUs
#   docker build -t dsv3-jax:cuda --build-arg EXTRAS=cuda13 .                       for NVIDIA GPUs
#   docker run --rm -v "$PWD/runs:/srv/dsv3/runs" dsv3-jax train --preset nano --out runs/nano
#   docker run --rm --gpus all --shm-size 8g -v "$PWD/runs:/srv/dsv3/runs" dsv3-jax:cuda train --preset nano --out runs/nano
#
# The wheels of JAX bring CUDA along: the host needs only the driver (580 or newer for cuda13, 525 or newer for cuda12)
# and the NVIDIA Container Toolkit.
FROM python:3.12-slim

ARG EXTRAS=

WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY dsv3_jax dsv3_jax
COPY pallas_kernels pallas_kernels
# The requirements are bounded in pyproject.toml.
# hadolint ignore=DL3013
RUN pip install --no-cache-dir ".[${EXTRAS}]" && rm -rf /source/*

RUN useradd --create-home --uid 1000 dsv3 && mkdir -p /srv/dsv3/runs && chown -R dsv3 /srv/dsv3
USER 1000
WORKDIR /srv/dsv3
ENTRYPOINT ["dsv3"]
CMD ["--help"]
