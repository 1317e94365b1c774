"""Answers to publishers: repositories, references, uploads (LFS, multipart, Xet), and commits."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hub_server.http_handler import REPOSITORY, Handler, route
from hub_server.repositories import LARGEST_REGULAR_FILE, LFS_SUFFIXES, HubError, Repository, StoredFile, large_file, regular_file

_MODEL = f"/api/models/{REPOSITORY}"
# A few of the Hub's identifiers: enough to refuse one that it does not have.
_LICENCES = {"apache-2.0", "mit", "llama2", "llama3", "gemma", "cc-by-4.0", "cc-by-nc-4.0", "openrail", "other"}
_RELATIONS = (None, "adapter", "merge", "quantized", "finetune")


@route("POST", "/api/repos/create")
def create_repository(request: Handler) -> None:
    settings = request.body_json()
    namespace = settings.get("organization") or request.user("write")
    request.user("write", namespace)
    name = f"{namespace}/{settings['name']}"
    url = f"{request.hub.endpoint}/{name}"
    with request.hub.lock:
        if name in request.hub.repositories:
            message = "You already created this model repo"
            request.json({"error": message, "url": url}, 409, {"X-Error-Message": message})
            return
        repository = request.hub.new_repository(name, private=settings.get("visibility") == "private")
        attributes = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()
        repository.commit("main", {".gitattributes": regular_file(request.hub.blobs, attributes)}, "initial commit")
    request.json({"url": url, "name": name, "id": name})


@route("DELETE", "/api/repos/delete")
def delete_repository(request: Handler) -> None:
    settings = request.body_json()
    name = f"{settings.get('organization') or request.user('write')}/{settings['name']}"
    request.repository(name, "write")
    del request.hub.repositories[name]
    request.json({})


@route("POST", "/api/validate-yaml")
def validate_card(request: Handler) -> None:
    import yaml

    match = re.match(r"^---\r?\n(.*?)\r?\n---", request.body_json().get("content", ""), re.S)
    errors: list[dict[str, str]] = []
    warnings: list[dict[str, str]] = []
    metadata: Any = {}
    try:
        metadata = yaml.safe_load(match.group(1)) if match else {}
    except yaml.YAMLError as error:
        errors.append({"message": f"YAML parse error: {error}"})
    if match is None:
        warnings.append({"message": "empty or missing yaml metadata in repo card"})
    if isinstance(metadata, dict):
        if metadata.get("base_model_relation") not in _RELATIONS:
            errors.append({"message": '"base_model_relation" must be one of [adapter, merge, quantized, finetune]'})
        for key in ("tags", "datasets", "metrics", "model-index"):
            if key in metadata and not isinstance(metadata[key], list):
                errors.append({"message": f'"{key}" must be an array'})
        languages = metadata.get("language", [])
        if not all(isinstance(language, str) for language in (languages if isinstance(languages, list) else [languages])):
            errors.append({"message": '"language" must be a string'})
        if not isinstance(metadata.get("pipeline_tag", ""), str):
            errors.append({"message": '"pipeline_tag" must be a string'})
        stated = metadata.get("license", [])
        if not set(stated if isinstance(stated, list) else [stated]) <= _LICENCES:
            errors.append({"message": '"license" must be one of [apache-2.0, mit, ...]'})
        errors += [{"message": problem} for model in metadata.get("model-index") or [] for problem in _index_problems(model)]
    request.json({"errors": errors, "warnings": warnings}, 400 if errors else 200)


def _index_problems(model: Any) -> list[str]:
    """What the Hub misses in an entry of the model index."""
    problems = [] if isinstance(model.get("name"), str) else ['"model-index[0].name" is required']
    for i, result in enumerate(model.get("results", [])):
        needed = {"task.type": result.get("task", {}).get("type")}
        needed |= {f"dataset.{key}": result.get("dataset", {}).get(key) for key in ("type", "name")}
        for metric in result.get("metrics") or [{}]:
            needed |= {f"metrics.{key}": metric.get(key) for key in ("type", "value")}
        problems += [f'"model-index[0].results[{i}].{key}" is required' for key, value in needed.items() if value is None]
    return problems


@route("POST", f"{_MODEL}/branch/(?P<branch>.+)")
def create_branch(request: Handler, name: str, branch: str) -> None:
    settings = request.body_json()
    repository = request.repository(name, "write")
    _new_reference(repository, repository.branches, branch, settings.get("startingPoint", "main"))
    request.json({})


@route("POST", f"{_MODEL}/tag/(?P<revision>.+)")
def create_tag(request: Handler, name: str, revision: str) -> None:
    settings = request.body_json()
    repository = request.repository(name, "write")
    _new_reference(repository, repository.tags, settings["tag"], revision)
    request.json({})


def _new_reference(repository: Repository, references: dict[str, str], name: str, revision: str) -> None:
    commit = repository.resolve(revision)
    if name in references:
        raise HubError(409, "Reference already exists")
    references[name] = commit


@route("POST", f"{_MODEL}/preupload/(?P<revision>[^/]+)")
def before_upload(request: Handler, name: str, revision: str) -> None:
    wanted = request.body_json()["files"]
    repository = request.branch_to_write(name, revision)
    files = repository.files(revision)
    ignored = _ignored(request, files)
    rows = []
    for file in wanted:
        sample = base64.b64decode(file.get("sample", ""))
        large = file["size"] > LARGEST_REGULAR_FILE or file["path"].endswith(LFS_SUFFIXES) or b"\0" in sample
        old = files.get(file["path"])
        oid = (old.sha256 if old.lfs else old.git_oid) if old else None
        rows.append({"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": file["path"] in ignored, "oid": oid})
    request.json({"files": rows, "commitOid": repository.resolve(revision)})


def _ignored(request: Handler, files: Mapping[str, StoredFile]) -> set[str]:
    """Names in the repository's .gitignore; patterns are not imitated."""
    file = files.get(".gitignore")
    return set(request.hub.blobs.path(file.sha256).read_text().split()) if file else set()


@route("POST", rf"/{REPOSITORY}\.git/info/lfs/objects/batch")
def lfs_batch(request: Handler, name: str) -> None:
    batch = request.body_json()
    request.branch_to_write(name, batch.get("ref", {}).get("name", "main"))
    objects = [_lfs_object(request, name, wanted, "multipart" in batch["transfers"]) for wanted in batch["objects"]]
    headers = {"Content-Type": "application/vnd.git-lfs+json"}
    request.json({"transfer": "basic", "objects": objects}, headers=headers)


def _lfs_object(request: Handler, name: str, wanted: dict[str, Any], multipart: bool) -> dict[str, Any]:
    sha256, size, part = wanted["oid"], wanted["size"], request.hub.part_size
    answer: dict[str, Any] = {"oid": sha256, "size": size}
    if request.hub.blobs.holds(sha256, size):
        return answer
    target = f"{request.hub.storage}/lfs/{sha256}?signature=1"
    upload: dict[str, Any] = {"href": target}
    if part and size > part and multipart:
        parts = {f"{number:05d}": f"{target}&part={number}" for number in range(1, -(-size // part) + 1)}
        upload = {"href": f"{request.hub.endpoint}/lfs-complete/{sha256}", "header": {"chunk_size": str(part), **parts}}
    answer["actions"] = {"upload": upload, "verify": {"href": f"{request.hub.endpoint}/{name}.git/info/lfs/objects/verify"}}
    return answer


@route("PUT", "/lfs/(?P<sha256>[0-9a-f]{64})", origin="storage")
def lfs_upload(request: Handler, sha256: str) -> None:
    digest = hashlib.sha256()
    with tempfile.NamedTemporaryFile(dir=request.hub.folder, delete=False) as file:
        for piece in request.pieces():
            file.write(piece)
            digest.update(piece)
    if "part" in request.query:
        Path(file.name).replace(request.hub.folder / f"{sha256}.part{int(request.query['part']):05d}")
    elif digest.hexdigest() != sha256:
        raise HubError(400, "sha256 of the body is not the oid")
    else:
        Path(file.name).replace(request.hub.blobs.path(sha256))
    request.reply(200, {"ETag": f'"{digest.hexdigest()[:32]}"'})


@route("POST", "/lfs-complete/(?P<sha256>[0-9a-f]{64})")
def lfs_complete(request: Handler, sha256: str) -> None:
    request.drain()
    parts = sorted(request.hub.folder.glob(f"{sha256}.part*"))
    if request.hub.blobs.put(b"".join(part.read_bytes() for part in parts)) != sha256:
        raise HubError(400, "sha256 of the joined parts is not the oid")
    for part in parts:
        part.unlink()
    request.json({})


@route("POST", rf"/{REPOSITORY}\.git/info/lfs/objects/verify")
def lfs_verify(request: Handler, name: str) -> None:
    wanted = request.body_json()
    request.user("write")
    request.repository(name)
    if not request.hub.blobs.holds(wanted["oid"], wanted["size"]):
        raise HubError(404, "LFS object not found")
    request.json({})


@route("POST", f"{_MODEL}/commit/(?P<branch>[^/]+)")
def commit(request: Handler, name: str, branch: str) -> None:
    header, *operations = [json.loads(line) for line in request.body().splitlines() if line.strip()]
    repository = request.branch_to_write(name, branch)
    with request.hub.lock:
        if branch not in repository.branches:
            raise HubError(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        tip, parent = repository.branches[branch], header["value"].get("parentCommit")
        if parent and not tip.startswith(parent):
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        files = dict(repository.commits[tip].files)
        for operation in operations:
            _apply(request, files, operation["key"], operation["value"])
        new = repository.commit(branch, files, header["value"]["summary"])
    request.json({"success": True, "commitOid": new, "commitUrl": f"{request.hub.endpoint}/{name}/commit/{new}", "hookOutput": ""})


def _apply(request: Handler, files: dict[str, StoredFile], key: str, value: dict[str, Any]) -> None:
    path = value["path"]
    if key == "file":
        data = base64.b64decode(value["content"])
        if len(data) > LARGEST_REGULAR_FILE:
            raise HubError(400, f"{path}: files larger than 10 MiB must be LFS/Xet")
        files[path] = regular_file(request.hub.blobs, data)
    elif key == "lfsFile":
        files[path] = _uploaded(request, path, value["oid"], value.get("size"))
    elif key == "deletedFile":
        files.pop(path, None)
    elif key == "deletedFolder":
        for inside in [known for known in files if known.startswith(f"{path.rstrip('/')}/")]:
            del files[inside]


def _uploaded(request: Handler, path: str, sha256: str, size: int | None) -> StoredFile:
    """A large file whose bytes the client stored before the commit, through LFS or through Xet."""
    blobs, xet = request.hub.blobs, request.hub.xet
    xet_hash = xet.hash_of(sha256) if xet else None
    if not blobs.holds(sha256):
        if xet is None or xet_hash is None or size is None:
            raise HubError(400, f"LFS pointer pointed to a file that does not exist: {path}")
        target = request.hub.folder / f"{sha256}.from-xet"
        xet.read(xet_hash, size, target)
        if blobs.put_file(target) != sha256:
            raise HubError(400, f"{path}: the content in Xet storage does not hash to its oid")
        target.unlink()
    return large_file(sha256, blobs.path(sha256).stat().st_size, xet_hash)
