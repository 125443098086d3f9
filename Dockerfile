# SPDX-License-Identifier: MIT-0
#
# Any Debian or Ubuntu with Python 3.10 or newer.
ARG BASE_IMAGE=ubuntu:24.04
ARG EXTENSION=python-example-extension

FROM ${BASE_IMAGE} AS python
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        ca-certificates python3 \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /usr/share/man/* /usr/share/doc/*/*.gz
ENV LAMBDA_TASK_ROOT=/var/task

FROM python AS dependencies
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends python3-pip
# The lock files name every package that is needed, and allow only wheels.
ENV PIP_NO_CACHE_DIR=1 PIP_NO_DEPS=1 PIP_REQUIRE_HASHES=1
WORKDIR /build
ARG EXTENSION
COPY requirements.txt ./
RUN pip3 install --no-compile --target "/image${LAMBDA_TASK_ROOT}" -r requirements.txt
# The extension's dependencies stay separate from the function's.
COPY ${EXTENSION}/requirements.txt ${EXTENSION}/
# Lambda's file system is read-only, so compile now. Unchecked bytecode is valid whatever the times
# of the files are.
RUN pip3 install --no-compile --target "/image/opt/${EXTENSION}" \
        -r "${EXTENSION}/requirements.txt" \
    && python3 -m compileall -q --invalidation-mode unchecked-hash /image

FROM python AS code
WORKDIR /image
ARG EXTENSION
COPY lambda-entrypoint.sh ./
COPY *.py .${LAMBDA_TASK_ROOT}/
COPY extensions/${EXTENSION} opt/extensions/
COPY ${EXTENSION}/*.py opt/${EXTENSION}/
# Whatever the checkout looks like, make all files readable by any user, and make the two scripts
# executable and free of Windows line endings.
RUN chmod -R u=rwX,go=rX . \
    && chmod 755 lambda-entrypoint.sh opt/extensions/* \
    && sed -i 's/\r$//' lambda-entrypoint.sh opt/extensions/* \
    && mkdir var/runtime \
    && ln -s /lambda-entrypoint.sh var/runtime/bootstrap \
    && python3 -m compileall -q --invalidation-mode unchecked-hash .

# What runs on AWS Lambda.
FROM python AS lambda
COPY --from=dependencies /image /
COPY --from=code /image /
WORKDIR ${LAMBDA_TASK_ROOT}
ENTRYPOINT ["/lambda-entrypoint.sh"]
CMD ["lambda_function.lambda_handler"]

FROM dependencies AS rie
COPY scripts/requirements-rie.txt ./
RUN pip3 install --no-compile --target sam -r requirements-rie.txt \
    && case $(uname -m) in \
        x86_64) cpu=x86_64 ;; \
        aarch64) cpu=arm64 ;; \
        *) echo "there is no emulator for the CPU $(uname -m)" && exit 1 ;; \
    esac \
    && mkdir -p /image/usr/local/bin \
    && mv "sam/samcli/local/rapid/aws-lambda-rie-$cpu" /image/usr/local/bin/aws-lambda-rie

# The same plus the Runtime Interface Emulator, to run anywhere else. It runs as a user ID that
# nothing else uses: https://systemd.io/UIDS-GIDS
FROM lambda
COPY --from=rie /image/usr /usr
USER 60999:60999
