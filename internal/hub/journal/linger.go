package journal

import "context"

// stored names an entry on the disk.
type stored struct{ bucket, key string }

// strike takes an entry that is settled off the disk. One that the disk does
// not let go of is settled all the same, or what the cloud has got would be sent
// to it again and again and newer writes would wait behind it: it is struck as
// soon as the disk lets go. When the hub dies before that, the entry is sent
// once more. That brings nothing back to life, for it names the UID, and the
// kubelet, which sees a status that is not its own, writes the newest again.
// The caller holds j.write.
func (j *Journal) strike(ctx context.Context, s stored) {
	if err := j.remove(ctx, s.bucket, s.key); err != nil {
		j.cfg.Log.Warn("a settled journal entry stays on the disk for now", "object", s.key, "err", err)
		j.lingering[s] = struct{}{}
	}
}

// strikeLingering tries the entries again that the disk did not let go of.
func (j *Journal) strikeLingering(ctx context.Context) error {
	j.write.Lock()
	defer j.write.Unlock()
	for s := range j.lingering {
		if err := j.remove(ctx, s.bucket, s.key); err != nil {
			return err // it will not let go of the others either
		}
		delete(j.lingering, s)
	}
	return nil
}
