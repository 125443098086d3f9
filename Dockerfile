# Any Debian or Ubuntu with Python 3.10 or newer.
ARG BASE_IMAGE=ubuntu:24.04
ARG EXTENSION=python-example-extension

FROM ${BASE_IMAGE} AS python
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends python3 \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/*
ENV LAMBDA_TASK_ROOT=/var/task

FROM python AS dependencies
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends python3-pip
WORKDIR /build
ARG EXTENSION
COPY requirements.txt ./
RUN pip3 install --no-cache-dir --target "/image${LAMBDA_TASK_ROOT}" -r requirements.txt
# Each has its own: those of the extension never meet those of the function.
COPY ${EXTENSION}/requirements.txt ${EXTENSION}/
RUN pip3 install --no-cache-dir --target "/image/opt/${EXTENSION}" -r "${EXTENSION}/requirements.txt"

FROM dependencies AS rie
COPY requirements-rie.txt ./
RUN pip3 install --no-cache-dir --no-compile --no-deps --target sam -r requirements-rie.txt \
    && case $(uname -m) in aarch64) cpu=arm64 ;; *) cpu=x86_64 ;; esac \
    && install -D "sam/samcli/local/rapid/aws-lambda-rie-$cpu" /image/usr/local/bin/aws-lambda-rie

FROM python AS code
WORKDIR /image
ARG EXTENSION
COPY lambda-entrypoint.sh ./
COPY *.py .${LAMBDA_TASK_ROOT}/
COPY extensions/${EXTENSION} opt/extensions/
COPY ${EXTENSION}/*.py opt/${EXTENSION}/
# Whatever the modes in the checkout: readable by any user, the three that are started executable. Lambda's file system
# is read-only, so what Python would compile at each start is compiled here.
RUN chmod -R u=rwX,go=rX . \
    && chmod 755 lambda-entrypoint.sh opt/extensions/* opt/*/extension.py \
    && mkdir var/runtime \
    && ln -s /lambda-entrypoint.sh var/runtime/bootstrap \
    && python3 -m compileall -q .

# What runs on AWS Lambda.
FROM python AS lambda
COPY --from=dependencies /image /
COPY --from=code /image /
WORKDIR ${LAMBDA_TASK_ROOT}
ENTRYPOINT ["/lambda-entrypoint.sh"]
CMD ["lambda_function.lambda_handler"]

# The same, with the Runtime Interface Emulator for a run anywhere else.
FROM lambda
COPY --from=rie /image/usr /usr
