"""Speed and memory; no Ray and no network but where a bench says so."""
