# For machines that cannot pull RabbitMQ's image. As in that image, the server runs as user
# rabbitmq, and health checks run as root.
ARG BASE_IMAGE
FROM ${BASE_IMAGE}
RUN apt-get update && apt-get install -y --no-install-recommends rabbitmq-server
ENV HOME=/var/lib/rabbitmq
ENTRYPOINT ["setpriv", "--reuid=rabbitmq", "--regid=rabbitmq", "--init-groups", \
    "/usr/lib/rabbitmq/bin/rabbitmq-server"]
