# gemma2tool on the CPU, with what it needs to read models from hubs and object stores. scripts/image.sh builds it.
FROM python:3.12-slim AS build
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /source
COPY CMakeLists.txt LICENSE README.md pyproject.toml ./
COPY gemma2tool gemma2tool
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.12-slim
# The package index of torch's CPU build; without it, pip takes the default build, with CUDA.
ARG TORCH_INDEX=""
RUN pip install --no-cache-dir ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch
COPY --from=build /wheels /wheels
RUN pip install --no-cache-dir "$(echo /wheels/*.whl)[hub,https,s3,gcs]"
USER 1000
WORKDIR /work
ENTRYPOINT ["gemma2tool"]
