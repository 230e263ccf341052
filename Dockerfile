# docker build -t srd .
# How to run it, and why so: docs/container.md.
#
# Without PyPI: --build-context wheels=DIRECTORY --build-arg PIP_NO_INDEX=1, where the directory is filled by
#   pip download --require-hashes -r requirements.txt -d DIRECTORY && pip download 'setuptools>=69' -d DIRECTORY
ARG BASE=debian:12-slim

FROM scratch AS wheels

FROM ${BASE} AS build
ARG PIP_NO_INDEX
RUN apt-get update && apt-get install -y --no-install-recommends python3-venv && rm -rf /var/lib/apt/lists/*
COPY requirements.txt /src/
RUN --mount=type=bind,from=wheels,target=/wheels \
    python3 -m venv /opt/srd \
    && /opt/srd/bin/pip install --no-cache-dir --find-links /wheels --require-hashes -r /src/requirements.txt
COPY pyproject.toml README.md LICENSE /src/
COPY srd /src/srd
# pip has done its work: what is not there needs no update.
RUN --mount=type=bind,from=wheels,target=/wheels \
    /opt/srd/bin/pip install --no-cache-dir --find-links /wheels --no-deps /src \
    && /opt/srd/bin/pip uninstall --yes setuptools pip

FROM ${BASE}
# Numbers of their own: a volume keeps the owner's number, and the next image must have the same.
RUN groupadd --gid 6379 redis \
    && useradd --uid 6379 --gid redis --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin redis \
    && groupadd --gid 6380 stunnel4 \
    && useradd --uid 6380 --gid stunnel4 --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin stunnel4 \
    && apt-get update \
    && apt-get install -y --no-install-recommends python3 redis-tools stunnel4 nftables iptables curl \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/srd /opt/srd
ENV PATH=/opt/srd/bin:$PATH PYTHONUNBUFFERED=1
VOLUME /var/lib/srd /var/log/srd
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s CMD ["curl", "-fs", "-o", "/dev/null", "http://127.0.0.1:8080/health"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["srd"]
CMD ["run"]
