"""Which operations run on this machine? `python -m ctxprune.kernels` prints one line each."""

from __future__ import annotations

from ctxprune.kernels import describe

if __name__ == "__main__":
    for row in describe():
        print(
            f"{'yes' if row['available'] else 'no ':3} {row['operation']:20} {row['implementation']:10} {row['reason']}"
        )
