# CPU:  docker build -t moe-svd-distill .
# CUDA: docker build -t moe-svd-distill --build-arg BASE=nvidia/cuda:12.8.1-runtime-ubuntu24.04 .
# TORCH_INDEX is the index of other builds of torch, smaller ones for CPUs alone among them: its installation page names them.
# Run:  docker run --rm -v "$PWD:/work" moe-svd-distill distill recipe.yaml
ARG BASE=ubuntu:24.04
FROM ${BASE}

ARG TORCH_INDEX=
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates python3 python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 distill \
    && mkdir /work && chown distill /work

ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY src src
COPY lab lab
# hadolint ignore=DL3013
RUN python3 -m venv /opt/venv \
    && pip install --no-cache-dir ${TORCH_INDEX:+--index-url "${TORCH_INDEX}"} "torch>=2.8" \
    && pip install --no-cache-dir ".[gguf,datasets]"

USER 10001
WORKDIR /work
ENTRYPOINT ["moe-svd-distill"]
CMD ["--help"]
