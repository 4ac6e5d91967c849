"""Shapes of secrets, none of them anybody's, and words that only look like them."""

from __future__ import annotations

import json

LETTERS = "aB3dE6gH9jK2mN5pQ8sT1vW4yZ7bC0xR"

# fmt: off
IN_PATHS = {
    "hub": "hf_" + LETTERS, "hub, oauth": "hf_oauth_" + LETTERS, "hub, organisation": "api_org_" + LETTERS,
    "github": "ghp_" + LETTERS + "abcd", "github, server": "ghs_" + LETTERS, "github, fine": "github_pat_11" + LETTERS,
    "gitlab": "glpat-" + LETTERS[:20], "gitlab, deploy": "gldt-" + LETTERS[:20], "openai": "sk-" + LETTERS,
    "openai, project": "sk-proj-" + LETTERS + "_-x", "anthropic": "sk-ant-api03-" + LETTERS, "groq": "gsk_" + LETTERS,
    "nvidia": "nvapi-" + LETTERS, "aws": "AKIA" + "IOSFODNN7EXAMPL3", "aws, session": "ASIA" + "IOSFODNN7EXAMPL3",
    "google": "AIza" + LETTERS + "abc", "google, oauth": "ya29." + LETTERS, "slack": "xoxb-123456789012-" + LETTERS,
    "slack, app": "xapp-1-" + LETTERS, "npm": "npm_" + LETTERS + "abcd", "pypi": "pypi-AgEIcHlwaS5vcmc" + LETTERS,
    "docker": "dckr_pat_" + LETTERS, "stripe": "sk_live_" + LETTERS, "sendgrid": f"SG.{LETTERS[:22]}.{LETTERS}",
    "databricks": "dapi" + "0123456789abcdef" * 2, "digitalocean": "dop_v1_" + "0123456789abcdef" * 4,
    "atlassian": "ATATT3" + LETTERS, "jwt": f"eyJhbGciOiJIUzI1NiJ9.eyJzdWIi{LETTERS}.{LETTERS}",
    "aws, bearer": "ABIA" + "IOSFODNN7EXAMPL3", "shopify": "shpat_" + "0123456789abcdef" * 2,
    "grafana": "glsa_" + LETTERS + "_1234abcd", "linear": "lin_api_" + LETTERS, "figma": "figd_" + LETTERS,
    "notion": "ntn_" + LETTERS, "vault": "hvs." + LETTERS, "pulumi": "pul-" + "0123456789abcdef" * 2,
    "sentry": "sntrys_" + LETTERS, "planetscale": "pscale_tkn_" + LETTERS, "jina": "jina_" + LETTERS,
    "postman": "PMAK-" + LETTERS[:24] + "-" + LETTERS, "supabase": "sbp_" + "0123456789abcdef" * 2,
    "webhook": "whsec_" + LETTERS, "langsmith": "lsv2_pt_" + LETTERS + "_abc1", "cerebras": "csk-" + LETTERS,
    "tavily": "tvly-" + LETTERS, "pinecone": "pcsk_" + LETTERS, "doppler": "dp.pt." + LETTERS,
    "rubygems": "rubygems_" + "0123456789abcdef" * 2, "twilio": "SK" + "0123456789abcdef" * 2,
    "mailgun": "key-" + "0123456789abcdef" * 2, "tailscale": "tskey-auth-" + LETTERS, "fireworks": "fw_" + LETTERS,
    "wandb, new": "wandb_v1_" + LETTERS, "square": "sq0atp-" + LETTERS[:22], "cloudflare": "cfat_" + LETTERS,
    "telegram": "123456789:AA" + LETTERS + "x", "replicate": "r8_" + LETTERS,
}
"""As they may stand in the name of a folder, too."""
SECRET = "pl4in-w0rd-" + "0123456789abcdef0123456789abcdef01234567"
IN_TEXT = {
    "password": f"https://user:{SECRET}@host/model", "password of a git address": f"git+https://me:{SECRET}@host/x.git",
    "a token in an address": f"https://{SECRET}@host/x", "with a slash": f"https://user:{SECRET}/{SECRET}@host/x",
    "with an at": f"ftp://user:{SECRET}@{SECRET}@host/x", "a database": f"postgres://u:{SECRET}@10.0.0.1:5432/db",
    "without a scheme": f"user:{SECRET}@host.org/x", "azure": f"https://a.blob.core.windows.net/c?sv=1&sig={SECRET}",
    "aws, signed": f"https://b.s3.amazonaws.com/k?X-Amz-Signature={SECRET}&x=1", "query": f"https://h/x?token={SECRET}",
    "wandb": f"WANDB_API_KEY={SECRET}", "key": f"key={SECRET}", "azure, account": f"x;AccountKey={SECRET};y",
    "aws, secret": f"aws_secret_access_key={SECRET}", "password by name": f"PGPASSWORD=x password={SECRET}",
    "bearer": f"Authorization: Bearer {SECRET}", "basic": f"Authorization: Basic {SECRET}",
    "header": f"x-api-key: {SECRET}", "json": json.dumps({"api_key": SECRET}),
    "json, password": str({"db_password": SECRET}),
    "a flag in a line": f"ran with --hub-token {SECRET} --x", "a short flag": f"-password {SECRET}",
    "yaml": f"db_password: {SECRET}", "yaml, key": f"  api_key: {SECRET}",
    "netrc": f"machine host login me password {SECRET}",
    "google, refresh": f"1//0{SECRET}", "curl": f"curl -u me:{SECRET} http://h", "curl, user": f"--user me:{SECRET} x",
    "header of a proxy": f"X-Auth-Token: {SECRET}", "header of gitlab": f"PRIVATE-TOKEN: {SECRET}",
    "cookie": f"Set-Cookie: session={SECRET}; a={SECRET}", "a list of words": str(["x", "--hub-token", SECRET, "y"]),
    "a quoted flag": f'--hub-token "{SECRET}"', "json, token": json.dumps({"hf_token": SECRET}),
    "yaml, token": f"hub_token: {SECRET}", "camels": json.dumps({"clientSecret": SECRET, "dbPassword": SECRET}),
    "pass": f"DB_PASS={SECRET}", "auth": f"https://h/?auth={SECRET}&y", "of this machine": f"user:{SECRET}@localhost",
    "fragment": f"https://h/#access_token={SECRET}", "nobody": f"redis://:{SECRET}@h:6379",
    "pem": f"-----BEGIN RSA PRIVATE KEY-----\n{SECRET}\n-----END RSA PRIVATE KEY-----",
    "ssh": f"-----BEGIN OPENSSH PRIVATE KEY-----\n{SECRET}\n",
}
FLAGS = ("--hub-token", "--password", "--api-key", "--wandb_key", "--client-secret", "--aws-secret-access-key")
INNOCENT = (
    "meta-llama/Llama-3.1-8B", "hf_hub", "/data/hf_models/hf_llama-3.1-8b-instruct", "basic training",
    "sk-learn-models-v2", "pypi-mirror-of-the-lab", "monkey=3", "x@y", "a/b:1", "http://host:8080/x@v1",
    "--max-new-tokens=12", "tokens/s", "2f0a5c3b9e1d4f6a7b8c9d0e1f2a3b4c5d6e7f80", "someone@example.org",
    "risk-adjusted-returns-1990-2020", "task-oriented-dialogue-2024-final", '{"pad_token": "<pad>"}',
    "12:30 an hour, C:\\data", "--max-new-tokens 12 --hub-model-id a/b", "a token for the Hub", "no password: none",
    "key-value-store-of-2024-with-names", "fw_lora_adapter_weights_epoch_2024_final", "jina_embeddings_v2_base_2024",
    "pass=1, auth=none", "python -u train.py", "--num-pass 3", '{"eos_token": "<|reserved_special_token_0|>"}',
    "pad_token: <pad>", "sl.text2text.generation.pipelines", "commit-2f0a5c3b9e1d4f6a7b8c9d0e1f2a3b4c5d6e7f80",
    "no token for the Hub on this machine: run hf auth login", "--eos-token-id 2", "pre-token 5",
)
# fmt: on
