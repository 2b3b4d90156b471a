"""One of two processes of `test_mesh_processes.py`: train, estimate a Fisher, merge; print what came out."""

import json
import sys


def main(port: int, process: int, folder: str, part: str) -> None:
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 2 if part != "alone" else 4)
    jax.config.update("jax_enable_preemption_service", False)
    from fishjax import mesh

    if part != "alone":
        mesh.connect(f"127.0.0.1:{port}", 2, process, timeout=60)
    import jax.numpy as jnp
    import numpy as np
    import optax
    from jax.sharding import PartitionSpec as P

    from fishjax import contribute, fisher, masks, merge, patches, train
    from fishjax.errors import UsageError

    on = mesh.make({"fsdp": 4})
    rng = np.random.default_rng(0)
    base = {"w": rng.normal(size=(8, 4)).astype(np.float32), "b": np.zeros(4, np.float32)}
    params = mesh.shard(base, [("w", P("fsdp")), ("b", P())], on)
    x, y = (rng.normal(size=(4, 8, n)).astype(np.float32) for n in (8, 4))
    batches = [mesh.shard_batch({"x": x[i], "y": y[i]}, on) for i in range(4)]

    def loss(params, example):
        return ((example["x"] @ params["w"] + params["b"] - example["y"]) ** 2).sum()

    optimizer = optax.adam(1e-2)
    start = lambda: mesh.follow(train.init(patches.init_dense(base), optimizer), params)
    step = train.make_step(loss, optimizer)
    state, _ = train.fit(start(), step, params, batches, steps=2, folder=f"{folder}/{part}", every=2)
    # It goes on from what was saved, whatever state it is given.
    blank = jax.tree.map(jnp.zeros_like, start())
    state, _ = train.fit(blank, step, params, batches, steps=4, folder=f"{folder}/{part}", every=2)
    straight, _ = train.fit(start(), step, params, batches, steps=4)
    tuned = jax.jit(patches.apply)(params, train.patch_of(state))
    squares = fisher.estimate(fisher.empirical(loss, method="reference"), params, batches)
    merging = jax.jit(lambda a, b, f: merge.fisher([a, b], fishers=[f, f], weights=[1, 2]))
    kept = masks.topk(squares, density=0.3)
    chosen = contribute.magnitude(None, params, None, [], density=0.3).patch["w"]
    found = {
        "mask": kept,
        "chosen": (chosen.indices, chosen.values),
        "tuned": tuned,
        "straight": jax.jit(patches.apply)(params, train.patch_of(straight)),
        "fisher": squares,
        "merged": merging(params, tuned, squares),
    }

    w = rng.normal(size=(8, 4)).astype(np.float32)
    w[0] = np.nan  # of what the first process holds; the second must not wait for it
    try:
        masks.topk(
            {"w": jax.make_array_from_callback(w.shape, params["w"].sharding, w.__getitem__)}, density=0.3
        )
        refused = ""
    except UsageError as error:
        refused = str(error)

    whole = lambda x: np.asarray(x).tolist()
    layout = {"here": len(tuned["w"].addressable_shards), "spec": tuned["w"].sharding.spec[0]}
    layout |= {"refused": refused, "devices": jax.device_count()}
    print(json.dumps({**layout, **jax.tree.map(whole, mesh.gather(found))}))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
