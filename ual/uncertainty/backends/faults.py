"""What a server's error means: a fault of the request, of the moment, or of the run."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ual.config.elicit import EndpointConfig
from ual.errors import UserError

SHOWN = 300  # characters of a server's text that a message quotes
_TRANSIENT = {408, 409, 425, 429}
_SPENT_CODES = {
    "insufficient_quota", "billing_hard_limit_reached", "billing_not_active", "insufficient_balance",
    "insufficient_credits", "credit_balance_too_low", "payment_required",
    "exceeded_current_quota_error", "arrearage",
}  # fmt: skip
_SPENT_WORDS = re.compile(
    r"insufficient_quota|insufficient (?:balance|credits?|funds)|credit balance is too low|"
    r"requires more credits|credits? (?:are|is) (?:depleted|exhausted)",
    re.IGNORECASE,
)
_WRONG_KEY = re.compile(r"\b(?:incorrect|invalid) api key|api key not valid", re.IGNORECASE)
_UNSUPPORTED = re.compile(
    r"unsupported|(?:not|n't) support|unrecognized|unknown|unexpected|not (?:permitted|allowed|available)|"
    r"extra_forbidden|additional propert",
    re.IGNORECASE,
)
_LIMITS = {"max_tokens": "max_completion_tokens", "max_completion_tokens": "max_tokens"}
_LOGPROBS = ("logprobs", "top_logprobs")


@dataclass(frozen=True, slots=True)
class Fault:
    """A server's error: its words, its codes in lower case, the field it names, and its status if known."""

    message: str
    codes: frozenset[str] = frozenset()
    param: str = ""
    status: int | None = None


class ServerError(ValueError):
    """A body with a status of success that is an error."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault.message)
        self.fault = fault


def fault_in(body: Any) -> Fault | None:
    """Return the error that a body holds, in any server's form; None if it holds none.

    OpenAI and most others send ``{"error": {...}}``, Ollama and TGI ``{"error": "text"}``, Gemini a list of
    one, vLLM ``{"object": "error", "message": ...}``, FastAPI ``{"detail": ...}``.
    """
    if isinstance(body, list) and len(body) == 1:
        body = body[0]
    if not isinstance(body, dict):
        return None
    error = body.get("error") or (body if body.get("object") == "error" else None)
    if not error and body.get("detail"):
        return _detail(body["detail"])
    if not error:
        return None
    if not isinstance(error, dict):
        return Fault(str(error), _codes(body.get("error_type"), body.get("code")), status=_status(body))
    flagged = isinstance(metadata := error.get("metadata"), dict) and metadata.get("flagged_input")
    daily = "PerDay" in json.dumps(error.get("details"))  # Gemini: a limit per minute has the same code
    marks = ("flagged_input" if flagged else None, "insufficient_quota" if daily else None)
    return Fault(
        str(error.get("message") or json.dumps(error)),
        _codes(error.get("code"), error.get("type"), error.get("status"), *marks),
        str(error.get("param") or ""),
        _status(error),
    )


def fault_of(text: str) -> Fault:
    """Return the error in the body of an error status; a body that is not JSON is the message."""
    try:
        body = json.loads(text)
    except (ValueError, RecursionError):
        return Fault(text)
    return fault_in(body) or Fault(str(body.get("message") or text) if isinstance(body, dict) else text)


def quoted(text: str) -> str:
    """Return the start of a server's text in one line that every terminal can print."""
    line = " ".join(text[: 10 * SHOWN].split())[:SHOWN]
    return "".join(character if character.isprintable() else "\ufffd" for character in line)


def transient(status: int | None) -> bool:
    """Return whether the same request may succeed later; without a status it may."""
    return status is None or status in _TRANSIENT or status >= 500


def stops(
    status: int | None, fault: Fault, config: EndpointConfig, body: Mapping[str, Any]
) -> UserError | None:
    """Return the error of a fault that every request of the run has; None if it concerns one request.

    Args:
        status: of HTTP, or within the body of a status of success.
        fault: what the server says.
        config: the keys that a remedy names.
        body: of the request.
    """
    problem = f"the server answered {status}: {quoted(fault.message)}"
    place = f"{config.base_url}, model {config.model}"
    if status == 402 or fault.codes & _SPENT_CODES or _SPENT_WORDS.search(fault.message):
        remedy = (
            "the account's credit or quota is used up. Renew it, and run the same command again; it resumes"
        )
        return UserError(problem, place=place, remedy=f"{remedy} from the cache")
    if status in (400, 403, 422, 501) and (fields := _refused(fault, body)):
        return UserError(problem, place=place, remedy=_remedy(fields, config))
    refused = status in (401, 403, 404) and "flagged_input" not in fault.codes
    if refused or (status == 400 and _WRONG_KEY.search(fault.message)):
        remedy = "check base_url, model, and the key that api_key_env or api_key_file names"
        return UserError(problem, place=place, remedy=remedy)
    return None


def _refused(fault: Fault, body: Mapping[str, Any]) -> list[str]:
    """Return the fields of the request that the server does not accept, whatever the sample."""
    named = re.split(r"[.\[]", fault.param)[0]
    sent = [name for name in body if name not in ("model", "messages")]
    if named in sent and named not in _LIMITS:  # a limit may be too large for one long sample only
        return [named]
    if not _UNSUPPORTED.search(" ".join((fault.message, *fault.codes))):
        return []
    return [n for n in sent if n == named or re.search(rf"\b{re.escape(n)}\b", fault.message)]


def _remedy(fields: list[str], config: EndpointConfig) -> str:
    steps, omit = [], set(config.omit)
    for name in fields:
        if name in config.extra_body:
            steps.append(f"correct or remove {name} in backend.extra_body")
        elif name == "reasoning_effort":
            steps.append("correct or remove backend.reasoning_effort")
        elif name in _LIMITS:
            steps.append(f"set backend.max_tokens_field: {_LIMITS[name]}")
        else:
            omit |= {*_LOGPROBS} if name in _LOGPROBS else {name}
    if omit - set(config.omit):
        steps.append(f"set backend.omit: [{', '.join(sorted(omit))}]")
    if "max_tokens" in fields:
        steps.append(
            "if it is a reasoning model, also set backend.omit: [logprobs, temperature, top_logprobs] and "
            "backend.reasoning_tokens: 4000"
        )
    if omit & {*_LOGPROBS}:
        steps.append("p_true, and judge with read: first_token, need log-probabilities: remove them")
    return "; ".join(steps)


def _detail(detail: Any) -> Fault:
    if not isinstance(detail, list):
        return Fault(str(detail))
    faults = [item for item in detail if isinstance(item, dict)]
    places = [[str(part) for part in item.get("loc") or () if part != "body"] for item in faults]
    said = [f"{'.'.join(p)}: {item.get('msg')}" for p, item in zip(places, faults, strict=True)]
    codes = _codes(*(item.get("type") for item in faults))
    return Fault("; ".join(said) or str(detail), codes, param=".".join(places[0]) if places else "")


def _codes(*values: Any) -> frozenset[str]:
    return frozenset(str(value).lower() for value in values if value is not None)


def _status(error: Mapping[str, Any]) -> int | None:
    for name in ("code", "status", "status_code"):
        value = error.get(name)
        if re.fullmatch(r"[45]\d\d", str(value)):
            return int(str(value))
    kinds = {"rate_limit_exceeded": 429, "rate_limit_error": 429, "overloaded_error": 529, "overloaded": 529}
    kinds |= {"invalid_request_error": 400, "authentication_error": 401, "invalid_api_key": 401}
    kinds |= {"model_not_found": 404, "server_error": 500, "internal_server_error": 500}
    return next((kinds[code] for code in _codes(error.get("code"), error.get("type")) if code in kinds), None)
