# docker build -t srd .
# docker run --network host --cap-add NET_ADMIN --stop-timeout 45 -v /etc/srd:/etc/srd:ro -v srd:/var/lib/srd srd
#
# --stop-timeout: docker's 10 s would kill redis while it saves; redis.stop_grace and 30 s more are enough.
FROM debian:12-slim AS build
RUN apt-get update && apt-get install -y --no-install-recommends python3-venv && rm -rf /var/lib/apt/lists/*
COPY requirements.txt /src/
RUN python3 -m venv /opt/srd && /opt/srd/bin/pip install --no-cache-dir --require-hashes -r /src/requirements.txt
COPY pyproject.toml README.md /src/
COPY srd /src/srd
RUN /opt/srd/bin/pip install --no-cache-dir --no-deps /src

FROM debian:12-slim
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 redis-tools stunnel4 nftables curl \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/srd /opt/srd
ENV PATH=/opt/srd/bin:$PATH PYTHONUNBUFFERED=1
VOLUME /var/lib/srd
HEALTHCHECK --interval=5s --timeout=2s --start-period=60s CMD ["curl", "-fs", "-o", "/dev/null", "http://127.0.0.1:8080/health"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["srd"]
CMD ["run"]
