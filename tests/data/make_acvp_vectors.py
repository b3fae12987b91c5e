"""Takes the few of NIST's ACVP vectors for ML-KEM and ML-DSA that ``dpfa verify`` carries.

Source: usnistgov/ACVP-Server, gen-val/json-files, the files ``internalProjection.json`` of ML-KEM-keyGen-FIPS203,
ML-DSA-keyGen-FIPS204 and ML-DSA-sigVer-FIPS204, in the generation that kyber-py and dilithium-py carry under assets/ (its
sigVer vectors are of the internal interface). NIST has made the files anew since, with other cases. A work of the United
States' government and not subject to copyright there (17 U.S.C. 105); NIST asks to be named.

Run this file with the folder that holds the three to write the package's copy.
"""

from __future__ import annotations

import base64
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

TARGET = Path(__file__).resolve().parents[2] / "src/dp_flash_attention/quantum/checks/acvp_vectors.json"
SETS = {
    "ML-KEM-768": "ml_kem_768",
    "ML-KEM-1024": "ml_kem_1024",
    "ML-DSA-65": "ml_dsa_65",
    "ML-DSA-87": "ml_dsa_87",
}
CASES = 3
REASONS = ("no modification", "modify signature", "too many hints", "z too large")


def text(data: str) -> str:
    return base64.b64encode(bytes.fromhex(data)).decode()


def digest(data: str) -> str:
    return hashlib.sha3_256(bytes.fromhex(data)).hexdigest()


def groups(folder: Path, name: str) -> dict[str, dict[str, Any]]:
    content = json.loads((folder / name / "internalProjection.json").read_text(encoding="utf-8"))
    return {SETS[g["parameterSet"]]: g for g in content["testGroups"] if g["parameterSet"] in SETS}


def key_generation(group: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "tcId": test["tcId"],
            # FIPS 203 hands ML-KEM's two seeds over as d ‖ z; FIPS 204 has one.
            "seed": text(test["d"] + test["z"] if "d" in test else test["seed"]),
            "public_key_sha3_256": digest(test.get("ek") or test["pk"]),
        }
        for test in group["tests"][:CASES]
    ]


def verification(group: dict[str, Any]) -> dict[str, Any]:
    chosen = [next(test for test in group["tests"] if test["reason"] == reason) for reason in REASONS]
    return {
        "public_key": text(group["pk"]),
        "cases": [
            {
                "tcId": test["tcId"],
                "reason": test["reason"],
                "message": text(test["message"]),
                "signature": text(test["signature"]),
                "passes": test["testPassed"],
            }
            for test in chosen
        ],
    }


def main() -> None:
    folder = Path(sys.argv[1])
    keys = groups(folder, "ML-KEM-keyGen-FIPS203") | groups(folder, "ML-DSA-keyGen-FIPS204")
    signatures = groups(folder, "ML-DSA-sigVer-FIPS204")
    vectors = {
        "source": "NIST, usnistgov/ACVP-Server, gen-val/json-files: ML-KEM-keyGen-FIPS203, ML-DSA-keyGen-FIPS204, "
        "ML-DSA-sigVer-FIPS204 (internal interface), in the generation that kyber-py and dilithium-py carry in assets/",
        "licence": "A work of the United States' government, not subject to copyright there (17 U.S.C. 105).",
        "key_generation": {name: key_generation(group) for name, group in keys.items()},
        "verification": {name: verification(group) for name, group in signatures.items()},
    }
    TARGET.write_text(
        json.dumps(vectors, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
