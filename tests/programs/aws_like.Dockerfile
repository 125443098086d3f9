# An image laid out like AWS's own, public.ecr.aws/lambda/python, with a function and the emulator:
# Python is in /var/lang, and nowhere else.
ARG BASE_IMAGE
ARG SAMPLE_IMAGE
FROM ${SAMPLE_IMAGE} AS sample
FROM ${BASE_IMAGE}
RUN apt-get update && apt-get install -y --no-install-recommends ca-certificates python3-venv \
    && python3 -m venv --copies /var/lang && rm /usr/bin/python3*
COPY --from=sample /var/task /var/task
COPY --from=sample /lambda-entrypoint.sh /
COPY --from=sample /usr/local/bin/aws-lambda-rie /usr/local/bin/
ENV LAMBDA_TASK_ROOT=/var/task PATH=/var/lang/bin:/usr/local/bin:/usr/bin:/bin
WORKDIR /var/task
ENTRYPOINT ["/lambda-entrypoint.sh"]
CMD ["lambda_function.lambda_handler"]
