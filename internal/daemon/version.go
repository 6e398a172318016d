package daemon

import (
	"fmt"
	"runtime"
	"runtime/debug"
)

// version is set by the linker (see Makefile) and never at run time.
var version string

// Version says which build runs.
type Version struct {
	Version   string `json:"version"`   // Release tag or `git describe`; "unknown" without both.
	Commit    string `json:"commit"`    // Git commit, with "-dirty" when the tree had changes.
	GoVersion string `json:"goVersion"` // Compiler.
	Platform  string `json:"platform"`  // Operating system and architecture.
}

// ReadVersion returns the version that the linker and the Go toolchain left
// in the binary.
func ReadVersion() Version {
	v := Version{
		Version:   version,
		Commit:    "unknown",
		GoVersion: runtime.Version(),
		Platform:  runtime.GOOS + "/" + runtime.GOARCH,
	}
	info, ok := debug.ReadBuildInfo()
	if ok {
		var dirty bool
		for _, s := range info.Settings {
			switch s.Key {
			case "vcs.revision":
				v.Commit = s.Value
			case "vcs.modified":
				dirty = s.Value == "true"
			}
		}
		if dirty {
			v.Commit += "-dirty"
		}
		if v.Version == "" && info.Main.Version != "(devel)" {
			v.Version = info.Main.Version
		}
	}
	if v.Version == "" {
		v.Version = "unknown"
	}
	return v
}

// String returns one line for `--version`.
func (v Version) String() string {
	return fmt.Sprintf("%s (commit %s, %s, %s)", v.Version, v.Commit, v.GoVersion, v.Platform)
}
