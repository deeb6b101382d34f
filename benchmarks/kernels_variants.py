import itertools, sys, time, torch
from benchmarks.kernels import *
import benchmarks.kernels as bk
import sample.kernels.item_attention as ia
torch.set_grad_enabled(False)
def setup(pdl=(1,2), rows=32):
    overlap.SMALL, overlap.LARGE = pdl; matmul.MAX_ROWS=rows
def show(title, scene, variants):
    L=len(scene.decoder.layers); res={}
    for r in range(2):
        for name,kw in variants.items():
            setup(**kw); res.setdefault(name,[]).append(microseconds([scene.forward],at_least=3)/L)
    setup()
    print(f"\n{title}: {scene.num_rows} rows, us per layer, twice")
    for name,v in res.items(): print(f"  {name:34}", " ".join(f"{x:7.2f}" for x in v), flush=True)
for shape in ("sdar-4b","sdar-8b"):
    d=random_decoder(shape,8,torch.bfloat16,"cuda").requires_grad_(False)
    show(f"{shape} one", Scene(d,1,1000,4), {f"pdl {p}":dict(pdl=p) for p in ((0,0),(1,2),(2,2),(1,1),(2,1))})
    if shape=="sdar-4b":
        for n in (4,128): show(f"{shape} {n}", Scene(d,n,1000,4), {f"pdl {p}":dict(pdl=p) for p in ((0,0),(1,2))})
        for B in (16,32):
            s=Scene(d,64,1000,B); q=s.rows(4096).view(s.num_rows,32,128)
            for mt,(k,w,st) in itertools.product((32,64,128),((64,4,3),(64,8,2),(64,8,3),(32,8,3),(32,4,3))):
                if mt==128 and (w!=8): continue
                ia.MAX_TILE=mt
                try: us=microseconds([lambda i=i: s.attend(i,q,splits=1,keys_at_a_time=k,num_warps=w,num_stages=st) for i in range(8)],repeats=3)
                except Exception as e: us=float("nan"); print(repr(e)[:100])
                print(f"block {B} tile {mt} keys {k} warps {w} stages {st}: {us:.1f} us",flush=True)
            ia.MAX_TILE=32
    cand=[Tiles(o,i,1,w,st) for o,i,w,st in ((64,128,4,3),(64,128,4,4),(64,128,4,5),(64,128,4,6),(64,128,4,8),(64,256,4,3),(64,256,4,4),(64,256,8,4),(64,64,4,8),(128,128,4,4),(128,128,8,5),(128,64,4,6))]
    bk.tile_candidates=lambda: cand
    sweep_products(d,8,["qkv","out","gate_up","down"])
