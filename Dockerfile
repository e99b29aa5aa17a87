# The server in a container, with the bundled model inside; no GPU is needed to build it.
#   on NVIDIA GPUs: docker build -t glm-jax .
#                   docker run --gpus all --shm-size 8g -p 5000:5000 -v /path/of/model:/model:ro -e MODEL_DIR=/model glm-jax
#   on a CPU:       docker build -t glm-jax:cpu --build-arg EXTRA=none .
#                   docker run -p 5000:5000 glm-jax:cpu
# Every flag of `serve` is an environment variable too, or goes behind: docker run … glm-jax python -m serving serve --help

FROM python:3.12-slim-trixie AS packages
# The scope of constraints.txt beside what serves: cuda12, or one that does not exist.
ARG EXTRA=cuda12
WORKDIR /build
COPY constraints.txt ./
RUN python -m venv /opt/glm-jax \
  && sed "s/extra == '${EXTRA}'/extra == ''/" constraints.txt > requirements.txt \
  && /opt/glm-jax/bin/pip install --no-cache-dir --no-compile --require-hashes -r requirements.txt

FROM python:3.12-slim-trixie AS project
WORKDIR /build
COPY constraints.txt ./
# What builds the wheel, as hashed as the rest.
RUN sed -n '/^setuptools==/,/[^\\]$/{s/ ; [^\\]*/ /;p;}' constraints.txt > builders.txt \
  && pip install --no-cache-dir --require-hashes -r builders.txt
COPY pyproject.toml README.md LICENSE ./
COPY glm_jax glm_jax
COPY checkpoints checkpoints
COPY serving serving
RUN pip install --no-cache-dir --no-deps --no-build-isolation --target /opt/app .

FROM python:3.12-slim-trixie
ARG EXTRA=cuda12
# Without a GPU the heavy operations are C, compiled for the processor that the container meets.
# hadolint ignore=DL3008
RUN if [ "${EXTRA}" = none ]; then \
    apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*; \
  fi
# The driver is the host's; NVIDIA's container runtime mounts it where these ask for it.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    PATH=/opt/glm-jax/bin:$PATH \
    PYTHONPATH=/opt/app \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp \
    MODEL_DIR=/opt/app/checkpoints/nano \
    PORT=5000
# The packages change with the lock, the project with every commit: two layers.
COPY --from=packages /opt/glm-jax /opt/glm-jax
COPY --from=project /opt/app /opt/app
WORKDIR /tmp
# A number, since Kubernetes tells a user that is not root by it.
USER 10001:10001
EXPOSE 5000
# That the process answers; whether the model is loaded, /readyz tells.
HEALTHCHECK --interval=15s --timeout=5s --start-period=60s \
  CMD ["python", "-c", "import os, urllib.request as web; web.urlopen('http://127.0.0.1:' + os.environ['PORT'] + '/healthz', timeout=4)"]
CMD ["python", "-m", "serving", "serve"]
