#!/bin/sh -e
# Makes what the commands of docs/deploying.md expect of AWS: a function named my-function, and the
# log of the function $1, where its extension has logged $2. It needs lambda_function.py.
trust='{"Version": "2012-10-17", "Statement": {"Effect": "Allow", "Action": "sts:AssumeRole",
    "Principal": {"Service": "lambda.amazonaws.com"}}}'
aws iam create-role --role-name my-role --assume-role-policy-document "$trust"
python3 -m zipfile -c function.zip lambda_function.py
aws lambda create-function --function-name my-function --runtime python3.13 --handler any.any \
    --role arn:aws:iam::123456789012:role/my-role --zip-file fileb://function.zip
log=/aws/lambda/$1
aws logs create-log-group --log-group-name "$log"
aws logs create-log-stream --log-group-name "$log" --log-stream-name any
aws logs put-log-events --log-group-name "$log" --log-stream-name any \
    --log-events "timestamp=$(date +%s)000,message='[$1] $2'"
