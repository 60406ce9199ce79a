"Packaging. Every value is read from `settings.ini`: change it there."
import re
from configparser import ConfigParser
from pathlib import Path
from shlex import split

from setuptools import find_packages, setup

root = Path(__file__).resolve().parent
config = ConfigParser(delimiters=['='])
config.read(root/'settings.ini', encoding='utf-8')
ini = config['DEFAULT']
package, home = ini['lib_path'], f"{ini['git_url']}/blob/{ini['branch']}"
readme = (root/'README.md').read_text(encoding='utf-8')
readme = re.sub(r'\]\((?!\w+:|#)', f']({home}/', readme)                              # its links are seen from the repository
readme = re.sub(r'/blob/(\S+\.(?:png|gif|webp|svg|jpg))\)', r'/raw/\1)', readme)     # and its pictures are files there

extras = {k.removesuffix('_requirements'): split(v) for k, v in ini.items() if k.endswith('_requirements')}
extras['dev'] += [r for k, v in extras.items() if k != 'dev' for r in v]   # whoever works on it needs every option
python = [int(o.split('.')[1]) for o in (ini['min_python'], ini['max_python'])]

setup(
    name=ini['lib_name'],
    version=ini['version'],
    description=ini['description'],
    long_description=readme,
    long_description_content_type='text/markdown',
    author=ini['author'],
    author_email=ini['author_email'],
    url=ini['git_url'],
    project_urls=dict(Documentation=ini['doc_host'] + ini['doc_baseurl'], Changes=f'{home}/CHANGELOG.md', Issues=f"{ini['git_url']}/issues"),
    license='Apache-2.0',
    license_files=['LICENSE', 'THIRD_PARTY.md'],
    keywords=ini['keywords'].split(),
    classifiers=[
        'Development Status :: 4 - Beta',
        'Intended Audience :: Education',
        'Intended Audience :: Science/Research',
        'Operating System :: OS Independent',
        'Programming Language :: Python :: 3',
        *(f'Programming Language :: Python :: 3.{n}' for n in range(python[0], python[1] + 1)),
        'Topic :: Scientific/Engineering :: Image Processing',
        'Typing :: Typed',
    ],
    packages=[*find_packages(include=[package, f'{package}.*']), f'{package}.weights'],
    include_package_data=True,   # what MANIFEST.in lists inside these: the weights, py.typed
    python_requires=f">={ini['min_python']}",
    install_requires=split(ini['requirements']),
    extras_require=extras,
    entry_points={
        'console_scripts': split(ini['console_scripts']),
        'nbdev': [f'{package}={package}._modidx:d'],
    },
)
