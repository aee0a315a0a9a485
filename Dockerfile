# The image that jobs/kuberay.yaml names: vaemo with its pins on Ray's own image, which brings Python, `ray` and a user
# that is not root. It holds no data, no keys, and not openSMILE, whose licence is for whoever uses it to accept.
#
#   docker build --tag registry.example/vaemo:0.1.0 .
#   docker build --tag registry.example/vaemo:0.1.0-gpu --build-arg DEVICE=gpu .
#
# DEVICE is cpu or gpu (CUDA 13); EXTRAS are those of pyproject.toml.
ARG DEVICE=cpu
FROM rayproject/ray:2.60.0-py311-${DEVICE}
ARG DEVICE
ARG EXTRAS=encoders,report,search,trackers

ENV RAY_USAGE_STATS_ENABLED=0 PYTHONUNBUFFERED=1
WORKDIR /home/ray/vaemo
COPY --chown=1000:100 pyproject.toml README.md LICENSE ./
COPY --chown=1000:100 jobs jobs
COPY --chown=1000:100 tune_spaces tune_spaces
COPY --chown=1000:100 vaemo vaemo
# uv takes torch from PyTorch's own index, so that an image for CPUs holds no CUDA.
RUN if [ "$DEVICE" = gpu ]; then backend=cu130; else backend=cpu; fi \
    && pip install --no-cache-dir uv==0.13.9 \
    && uv pip install --system --no-cache --torch-backend "$backend" --constraint jobs/constraints.txt ".[$EXTRAS]"
USER 1000
CMD ["vaemo", "--help"]
